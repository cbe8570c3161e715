// What the log and /metrics tell while a server starts. Thread: the one that starts it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/time/time.h"
#include "server/clock.h"
#include "server/engine/memory_plan.h"
#include "server/engine/prompt_limits.h"
#include "server/record/metrics.h"
#include "server/rpc/validate.h"

namespace prefilld {

// Of a model while its weights are read to the device, or mapped: then the fingerprint alone reads
// them, and there is no rate to tell.
class LoadingModel {
 public:
  LoadingModel(std::string name, bool mapped, Metrics& metrics);
  void Tell(uint64_t bytes, uint64_t of_bytes);
  void Done() const;  // the fingerprint has read the weights too

 private:
  double Rate() const;  // GB/s

  const std::string name_;
  const bool mapped_;
  Metrics& metrics_;
  const SteadyTime start_ = SteadyNow();
  SteadyTime told_ = start_;
  uint64_t bytes_ = 0;
  absl::Duration taken_;  // until `bytes_` were there
};

// The plan's table, a line a row.
void TellPlan(const MemoryPlan& plan, Metrics& metrics);

// Of the default of --max_prompt_tokens, and only where the operator can do something about it.
// asked: the plan of the default.
void TellLowered(const ModelInfos& models, const RequestLimits& limits, const MemoryPlan& asked);
// Where what is served over gRPC does not fit into a region.
void TellSmallRegions(const ModelInfos& models, const RequestLimits& limits);

}  // namespace prefilld
