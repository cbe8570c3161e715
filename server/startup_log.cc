#include "server/startup_log.h"

#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "server/config.h"
#include "server/record/log.h"
#include "server/transport/transports.h"

namespace prefilld {
namespace {

constexpr absl::Duration kLoadingInterval = absl::Seconds(2);  // from one word to the next

double Seconds(absl::Duration duration) {  // to the millisecond
  return static_cast<double>(absl::ToInt64Milliseconds(duration)) / 1000;
}

}  // namespace

LoadingModel::LoadingModel(std::string name, bool mapped, Metrics& metrics)
    : name_(std::move(name)), mapped_(mapped), metrics_(metrics) {}

void LoadingModel::Tell(uint64_t bytes, uint64_t of_bytes) {
  metrics_.ModelBytes(name_, bytes, of_bytes);
  bytes_ = bytes;
  taken_ = Since(start_);
  if (mapped_ || Since(told_) < kLoadingInterval) return;
  told_ = SteadyNow();
  Log(Level::kInfo, "model_loading",
      {{"model", name_}, {"bytes", bytes}, {"of_bytes", of_bytes}, {"gb_per_s", Rate()}});
}

void LoadingModel::Done() const {
  const double fingerprint = Seconds(Since(start_) - taken_);
  if (mapped_) {
    return Log(Level::kInfo, "model_loaded",
               {{"model", name_}, {"bytes", bytes_}, {"fingerprint_seconds", fingerprint}});
  }
  Log(Level::kInfo, "model_loaded",
      {{"model", name_},
       {"bytes", bytes_},
       {"seconds", Seconds(taken_)},
       {"gb_per_s", Rate()},
       {"fingerprint_seconds", fingerprint}});
}

double LoadingModel::Rate() const {
  const double seconds = absl::ToDoubleSeconds(taken_);
  return seconds <= 0 ? 0 : std::round(static_cast<double>(bytes_) * 1e-8 / seconds) / 10;
}

void TellPlan(const MemoryPlan& plan, Metrics& metrics) {
  for (const MemoryPlan::Row& row : plan.rows) {
    metrics.PlannedMemory(row.what, row.of, row.device, row.bytes);
    Log(Level::kInfo, "memory_plan",
        {{"what", row.what},
         {"model", row.of},
         {"place", row.device ? "device" : "host"},
         {"taken", Name(row.when)},
         {"bytes", row.bytes},
         {"mib", (row.bytes + (1 << 19)) >> 20},
         {"by", row.by}});
  }
  if (!plan.free) return;  // nothing is taken
  Log(Level::kInfo, "memory_planned",
      {{"max_prompt_tokens",
        plan.batches > 0 ? nlohmann::json(plan.prompt_tokens) : nlohmann::json()},  // of models
       {"device_bytes", plan.needs()},
       {"free_bytes", *plan.free},
       {"spare_bytes", plan.spare}});
}

void TellLowered(const ModelInfos& models, const RequestLimits& limits, const MemoryPlan& asked) {
  for (const ModelInfo* info : models) {
    const int64_t wanted = std::min(asked.prompt_tokens, info->max_positions);
    std::vector<std::string> bounds, needs;
    const PromptLimitInputs inputs{
        .asked = wanted, .models = {info}, .kv = limits.kv, .plan = asked};
    for (const PromptBound& bound : BoundsOf(inputs)) {
      bounds.push_back(bound.what);
      needs.push_back(bound.help);
    }
    if (bounds.empty()) continue;
    Log(Level::kWarning, "max_prompt_tokens_lowered",
        {{"model", info->name},
         {"max_prompt_tokens", PromptTokensMax(*info, limits)},
         {"wanted", wanted},
         {"not_retained", PromptTokensMax(*info, limits, /*retain=*/false)},
         {"limit", absl::StrJoin(bounds, ", ")},
         {"needs", absl::StrJoin(needs, ", ")}});
  }
}

void TellSmallRegions(const ModelInfos& models, const RequestLimits& limits) {
  for (const ModelInfo* info : models) {
    const int64_t sent = PromptTokensMax(*info, limits);
    for (const auto& [transport, bytes] : limits.kv_regions) {
      const int64_t most = PromptTokensMax(*info, limits, /*retain=*/true, transport);
      if (most >= sent) continue;
      Log(Level::kWarning, "max_prompt_tokens_lowered",
          {{"model", info->name},
           {"transport", Name(transport)},
           {"max_prompt_tokens", most},
           {"over_grpc", sent},
           {"limit", "the largest region"},
           {"bytes", bytes},
           {"needs_bytes", GeometryOf(*info, sent).region_bytes()}});
    }
  }
}

}  // namespace prefilld
