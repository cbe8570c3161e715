#include "server/engine/layer_parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "server/kv/block_pool.h"

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
  void AddAttention(const AttentionWork& work) {
    const int heads = work.q_heads, group = heads / work.kv_heads;
    const double each = work.seconds / heads;
    if (each > most_ && work.by_queries > 0) {
      for (int head = 0; head < heads; ++head) AddQueries(head, each, work);
      return;
    }
    if (!work.row_blocks.empty() && each > work.row_seconds) {
      for (int head = 0; head < heads; ++head) AddRows(head, each, work);
      return;
    }
    const int piece = each * group <= most_ ? group : 1;
    for (int first = 0; first < heads; first += piece) {
      const bool other_group = piece < group && first > 0 && first % group == 0;
      AttendRange& range = For(each * piece, other_group).attend;
      if (range.count == 0) range.first = first;
      range.count += piece;
    }
  }
  std::vector<LayerPart> Take() { return std::move(parts_); }

 private:
  // Ranges that take as long as each other: of the pairs of a query and a key that it sees, each
  // has as many.
  void AddQueries(int head, double seconds, const AttentionWork& work) {
    const auto prefix = static_cast<double>(work.prefix);
    const auto queries = static_cast<double>(work.by_queries);
    const double blocks = std::ceil(queries / kKvBlockTokens);
    const double ranges = std::clamp(std::ceil(seconds / most_), 1.0, blocks);
    const double pairs = prefix * queries + queries * queries / 2;
    int64_t first = 0;
    for (double range = 1; range <= ranges; ++range) {
      const double end = std::sqrt(prefix * prefix + 2 * pairs * range / ranges) - prefix;
      const int64_t whole = std::llround(end / kKvBlockTokens) * kKvBlockTokens;
      const int64_t count = (range < ranges ? whole : work.by_queries) - first;
      if (count <= 0) continue;
      const bool other_range = !parts_.empty() && parts_.back().attend.count > 0;
      For(seconds / ranges, other_range).attend = {head, 1, {first, count}};
      first += count;
    }
  }

  // The selection, then rows that have as many causal blocks together as those of other parts.
  void AddRows(int head, double seconds, const AttentionWork& work) {
    const auto& blocks = work.row_blocks;
    const auto rows = static_cast<int64_t>(blocks.size());
    const double all = std::accumulate(blocks.begin(), blocks.end(), 0.0);
    const double most = all * work.row_seconds / seconds;
    parts_.push_back({.attend = {.first = head, .count = 1, .selection = true}});
    double taken = 0;
    for (int64_t first = 0, row = 0; row < rows; ++row) {
      taken += static_cast<double>(blocks[row]);
      if (taken < most && row + 1 < rows) continue;
      parts_.push_back({.attend = {.first = head, .count = 1, .rows = {first, row + 1 - first}}});
      first = row + 1;
      taken = 0;
    }
  }

  const double most_;
  std::vector<LayerPart> parts_;
  double filled_ = 0;  // of the last
};

}  // namespace

void NarrowTo(const AttendRange& heads, AttentionArgs& args) {
  AttentionShape& shape = args.shape;
  const int group = shape.q_heads / shape.kv_heads;
  const auto bytes = [&](int64_t number, int64_t stride) {
    return number * stride * static_cast<int64_t>(SizeOf(shape.dtype));
  };
  for (ConstHeadsView* view : {&args.q, &args.k, &args.v}) {
    const int first = view == &args.q ? heads.first : heads.first / group;
    view->data = static_cast<const char*>(view->data) + bytes(first, view->head_stride);
  }
  args.o.data = static_cast<char*>(args.o.data) + bytes(heads.first, args.o.head_stride);
  if (args.lse != nullptr) args.lse += heads.first * shape.total_q();
  shape.q_heads = heads.count;
  shape.kv_heads = std::max(1, heads.count / group);
  if (heads.queries.count == 0) return;
  const int64_t first = heads.queries.first, end = first + heads.queries.count;
  args.q.data = static_cast<const char*>(args.q.data) + bytes(first, args.q.token_stride);
  args.o.data = static_cast<char*>(args.o.data) + bytes(first, args.o.token_stride);
  if (args.lse != nullptr) args.lse += first;
  shape.cu_seqlens_k = {0, shape.total_k() - shape.total_q() + end};
  shape.cu_seqlens_q = {0, heads.queries.count};
}

LayerPart WholeLayer(const ModelInfo& info, int64_t tokens, bool last) {
  return {.project = {0, tokens},
          .store = true,
          .attend = {0, info.q_heads, {}},
          .finish = {0, last ? 0 : tokens}};
}

std::vector<AttendRange> DivideAttention(const AttentionWork& work, double most) {
  if (work.seconds <= most) return {{0, work.q_heads, {}}};
  Filling filling(most);
  filling.AddAttention(work);
  std::vector<AttendRange> ranges;
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
  filling.AddAttention({.q_heads = info.q_heads,
                        .kv_heads = info.kv_heads,
                        .seconds = work.attend,
                        .by_queries = work.by_queries ? work.tokens : 0});
  if (!work.last) filling.Add(&LayerPart::finish, work.tokens, work.tile_tokens, work.finish);
  return filling.Take();
}

}  // namespace prefilld
