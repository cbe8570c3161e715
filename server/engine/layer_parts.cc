#include "server/engine/layer_parts.h"

#include <algorithm>

namespace prefilld {
namespace {

// Fills parts with pieces, in order.
class Filling {
 public:
  explicit Filling(double most) : most_(most) {}

  // The part that a piece of so many seconds goes into: apart, not the last.
  LayerPart& For(double seconds, bool apart = false) {
    if (parts_.empty() || apart || (filled_ > 0 && filled_ + seconds > most_)) {
      parts_.emplace_back();
      filled_ = 0;
    }
    filled_ += seconds;
    return parts_.back();
  }
  // Rows in tiles, to a range of each part.
  void Add(RowRange LayerPart::*range, int64_t tokens, int64_t tile_tokens, double seconds) {
    for (int64_t first = 0; first < tokens; first += tile_tokens) {
      const int64_t count = std::min(tile_tokens, tokens - first);
      const double share = static_cast<double>(count) / static_cast<double>(tokens);
      RowRange& rows = For(seconds * share).*range;
      if (rows.count == 0) rows.first = first;
      rows.count += count;
    }
  }
  // A part has heads of whole groups, or of one.
  void AddHeads(int heads, int group, double seconds) {
    const int piece = seconds * group / heads <= most_ ? group : 1;
    for (int first = 0; first < heads; first += piece) {
      const bool other_group = piece < group && first > 0 && first % group == 0;
      HeadRange& range = For(seconds * piece / heads, other_group).attend;
      if (range.count == 0) range.first = first;
      range.count += piece;
    }
  }
  std::vector<LayerPart> Take() { return std::move(parts_); }

 private:
  const double most_;
  std::vector<LayerPart> parts_;
  double filled_ = 0;  // of the last
};

}  // namespace

void NarrowTo(const HeadRange& heads, AttentionArgs& args) {
  AttentionShape& shape = args.shape;
  const int group = shape.q_heads / shape.kv_heads;
  const auto bytes = [&](int head, int64_t stride) {
    return head * stride * static_cast<int64_t>(SizeOf(shape.dtype));
  };
  for (ConstHeadsView* view : {&args.q, &args.k, &args.v}) {
    const int first = view == &args.q ? heads.first : heads.first / group;
    view->data = static_cast<const char*>(view->data) + bytes(first, view->head_stride);
  }
  args.o.data = static_cast<char*>(args.o.data) + bytes(heads.first, args.o.head_stride);
  if (args.lse != nullptr) args.lse += heads.first * shape.total_q();
  shape.q_heads = heads.count;
  shape.kv_heads = std::max(1, heads.count / group);
}

LayerPart WholeLayer(const ModelInfo& info, int64_t tokens, bool last) {
  return {.project = {0, tokens},
          .store = true,
          .attend = {0, info.q_heads},
          .finish = {0, last ? 0 : tokens}};
}

std::vector<HeadRange> DivideHeads(int q_heads, int kv_heads, double seconds, double most) {
  if (seconds <= most) return {{0, q_heads}};
  Filling filling(most);
  filling.AddHeads(q_heads, q_heads / kv_heads, seconds);
  std::vector<HeadRange> ranges;
  for (const LayerPart& part : filling.Take()) ranges.push_back(part.attend);
  return ranges;
}

std::vector<LayerPart> DivideLayer(const LayerWork& work, double most) {
  const ModelInfo& info = work.info;
  if (work.project + work.attend + work.finish <= most) {
    return {WholeLayer(info, work.tokens, work.last)};
  }
  Filling filling(most);
  filling.Add(&LayerPart::project, work.tokens, work.tile_tokens, work.project);
  filling.For(0).store = true;
  filling.AddHeads(info.q_heads, info.q_heads / info.kv_heads, work.attend);
  if (!work.last) filling.Add(&LayerPart::finish, work.tokens, work.tile_tokens, work.finish);
  return filling.Take();
}

}  // namespace prefilld
