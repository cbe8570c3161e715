#include "server/engine/prompt_limits.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "server/transport/segment_pool.h"

namespace prefilld {
namespace {

std::string GiB(uint64_t bytes) {
  return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / (1 << 30));
}

void BoundByPositions(const PromptLimitInputs& inputs, std::vector<PromptBound>* bounds) {
  int64_t positions = 0;
  for (const ModelInfo* model : inputs.models) {
    positions = std::max(positions, model->max_positions);
  }
  if (inputs.asked <= positions) return;
  bounds->push_back(
      {positions, "model", absl::StrCat("none has more than ", positions, " positions"), ""});
}

void BoundByKv(const PromptLimitInputs& inputs, std::vector<PromptBound>* bounds) {
  const ModelInfo* tightest = nullptr;
  int64_t least = inputs.asked;
  for (const ModelInfo* model : inputs.models) {
    const int64_t holds = GeometryOf(*model, 0).TokensInBlocks(inputs.kv.blocks, inputs.retain);
    if (holds >= std::min(least, model->max_positions)) continue;
    tightest = model;
    least = holds;
  }
  if (tightest == nullptr) return;
  bounds->push_back(
      {least, "kv_memory",
       absl::StrCat("one cache of model '", tightest->name, "' may hold ", least,
                    inputs.retain ? "" : ", if it passes through (retain = false)"),
       absl::StrCat("--kv_memory=",
                    FlagSize(KvMemoryFor(inputs.models, inputs.asked, inputs.kv, inputs.retain)))});
}

void BoundByDevice(const PromptLimitInputs& inputs, std::vector<PromptBound>* bounds) {
  const MemoryPlan& plan = inputs.plan;
  if (plan.fits >= inputs.asked) return;
  bounds->push_back(
      {plan.fits, "gpu memory",
       absl::StrCat(
           GiB(plan.needs()), " are needed beside the weights, ", GiB(plan.free.value_or(0)),
           " are free, ",
           plan.fits == 0 ? "no prompt fits" : absl::StrCat("at most ", plan.fits, " fit")),
       "a smaller --attend_memory or --kv_device_memory, a larger --gpu_memory where it is "
       "set, fewer --model"});
}

}  // namespace

// What a cache in blocks may have, one in a segment may have too.
KvShares ShareKv(const ModelInfos& models, uint64_t bytes, bool pooled) {
  KvShares shares;
  if (pooled) shares.segment_bytes = SegmentPool::WholeSteps(bytes / 2);
  for (const ModelInfo* model : models) {
    shares.block_bytes =
        std::max<uint64_t>(shares.block_bytes, GeometryOf(*model, 1).block_bytes());
  }
  shares.blocks = static_cast<int64_t>(shares.segment_bytes.value_or(bytes) / shares.block_bytes);
  return shares;
}

uint64_t KvMemoryFor(const ModelInfos& models, int64_t tokens, const KvShares& shares,
                     bool retain) {
  uint64_t bytes = 0;
  for (const ModelInfo* model : models) {
    const KvGeometry cache = GeometryOf(*model, std::min(tokens, model->max_positions));
    bytes =
        std::max(bytes, shares.block_bytes * cache.layers_held(retain) * cache.blocks_per_layer());
  }
  if (!shares.segment_bytes) return bytes;
  return 2 * SegmentPool::WholeSteps(bytes + SegmentPool::kStepBytes - 1);
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

std::vector<PromptBound> BoundsOf(const PromptLimitInputs& inputs) {
  std::vector<PromptBound> bounds;
  BoundByPositions(inputs, &bounds);
  BoundByKv(inputs, &bounds);
  BoundByDevice(inputs, &bounds);
  return bounds;
}

absl::Status CheckPromptTokens(const PromptLimitInputs& inputs) {
  const std::vector<PromptBound> bounds = BoundsOf(inputs);
  if (bounds.empty()) return absl::OkStatus();
  int64_t most = inputs.asked;
  std::vector<std::string> whys, helps;
  for (const PromptBound& bound : bounds) {
    most = std::min(most, bound.tokens);
    whys.push_back(absl::StrCat(bound.what, ": ", bound.why));
    if (!bound.help.empty()) helps.push_back(bound.help);
  }
  if (most > 0) helps.insert(helps.begin(), absl::StrCat("--max_prompt_tokens=", most));
  return absl::ResourceExhaustedError(
      absl::StrCat(inputs.asked, " do not fit, ",
                   most > 0 ? absl::StrCat("at most ", most, " do") : "no prompt does", ": ",
                   absl::StrJoin(whys, "; "), "; what helps: ", absl::StrJoin(helps, ", ")));
}

}  // namespace prefilld
