#include "server/engine/prompt_limits.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace prefilld {
namespace {

constexpr uint64_t kSegmentStep = uint64_t{64} << 10;  // a pool's bytes are a multiple of it

std::string GiB(uint64_t bytes) {
  return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / (1 << 30));
}

// What keeps prompts from being longer than `tokens`, and the flags that would help.
struct Bound {
  int64_t tokens;
  std::string why, help;
};

void BoundByPositions(const PromptLimitInputs& inputs, std::vector<Bound>* bounds) {
  int64_t positions = 0;
  for (const ModelInfo* model : inputs.models) {
    positions = std::max(positions, model->max_positions);
  }
  if (inputs.asked <= positions) return;
  bounds->push_back(
      {positions, absl::StrCat("model: none has more than ", positions, " positions"), ""});
}

void BoundByKv(const PromptLimitInputs& inputs, std::vector<Bound>* bounds) {
  const ModelInfo* tightest = nullptr;
  int64_t least = inputs.asked;
  for (const ModelInfo* model : inputs.models) {
    const int64_t holds = GeometryOf(*model, 0).TokensInBlocks(inputs.kv.blocks, /*retain=*/true);
    if (holds >= std::min(least, model->max_positions)) continue;
    tightest = model;
    least = holds;
  }
  if (tightest == nullptr) return;
  bounds->push_back(
      {least, absl::StrCat("kv_memory: one cache of model '", tightest->name, "' may hold ", least),
       absl::StrCat("--kv_memory=",
                    FlagSize(KvMemoryFor(inputs.models, inputs.asked, inputs.kv_room)))});
}

void BoundByDevice(const PromptLimitInputs& inputs, std::vector<Bound>* bounds) {
  const MemoryPlan& plan = inputs.plan;
  if (plan.fits >= plan.prompt_tokens) return;
  bounds->push_back(
      {plan.fits,
       absl::StrCat(
           "gpu memory: ", GiB(plan.needs()), " are needed beside the weights, ",
           GiB(plan.free.value_or(0)), " are free, ",
           plan.fits == 0 ? "no prompt fits" : absl::StrCat("at most ", plan.fits, " fit")),
       "a smaller --attend_memory, fewer --model"});
}

}  // namespace

KvGeometry GeometryOf(const ModelInfo& info, int64_t tokens) {
  return {info.layers, info.kv_heads, info.head_dim, info.dtype, tokens};
}

KvShares ShareKv(const ModelInfos& models, uint64_t bytes, uint64_t room) {
  KvShares shares{.segment_bytes = std::min(bytes, room) / 2 / kSegmentStep * kSegmentStep};
  for (const ModelInfo* model : models) {
    shares.block_bytes =
        std::max<uint64_t>(shares.block_bytes, GeometryOf(*model, 1).block_bytes());
  }
  // What a cache in blocks may have, one in a segment may have too, unless there is no room for it.
  const uint64_t of_blocks = room >= bytes ? shares.segment_bytes : bytes - shares.segment_bytes;
  shares.blocks = static_cast<int64_t>(of_blocks / shares.block_bytes);
  return shares;
}

uint64_t KvMemoryFor(const ModelInfos& models, int64_t tokens, uint64_t room) {
  const uint64_t block_bytes = ShareKv(models, 0, 0).block_bytes;
  uint64_t bytes = 0;
  for (const ModelInfo* model : models) {
    const KvGeometry cache = GeometryOf(*model, std::min(tokens, model->max_positions));
    bytes = std::max(bytes, block_bytes * cache.layers * cache.blocks_per_layer());
  }
  if (room == 0) return bytes;
  const uint64_t half = (bytes + kSegmentStep - 1) / kSegmentStep * kSegmentStep;
  return 2 * half <= room ? 2 * half : std::max(bytes + room / 2, room + 1);
}

std::string FlagSize(uint64_t bytes) {
  constexpr std::pair<const char*, int> kUnits[] = {{"GiB", 30}, {"MiB", 20}};
  for (const auto& [unit, shift] : kUnits) {
    const uint64_t whole = (bytes + (uint64_t{1} << shift) - 1) >> shift;
    // Not more than a few percent above, unless it is exact.
    if (whole >= 32 || whole << shift == bytes) return absl::StrCat(whole, unit);
  }
  return absl::StrCat((bytes + 1023) >> 10, "KiB");
}

absl::Status CheckPromptTokens(const PromptLimitInputs& inputs) {
  std::vector<Bound> bounds;
  BoundByPositions(inputs, &bounds);
  BoundByKv(inputs, &bounds);
  BoundByDevice(inputs, &bounds);
  if (bounds.empty()) return absl::OkStatus();
  int64_t most = inputs.asked;
  std::vector<std::string> whys, helps;
  for (const Bound& bound : bounds) {
    most = std::min(most, bound.tokens);
    whys.push_back(bound.why);
    if (!bound.help.empty()) helps.push_back(bound.help);
  }
  if (most > 0) helps.insert(helps.begin(), absl::StrCat("--max_prompt_tokens=", most));
  return absl::ResourceExhaustedError(
      absl::StrCat(inputs.asked, " do not fit, ",
                   most > 0 ? absl::StrCat("at most ", most, " do") : "no prompt does", ": ",
                   absl::StrJoin(whys, "; "), "; what helps: ", absl::StrJoin(helps, ", ")));
}

}  // namespace prefilld
