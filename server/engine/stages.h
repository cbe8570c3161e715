// One call of the waist: estimate, select, measure, attend, over the buffers that the stages need
// besides the caller's tensors. Owned by the engine, whose thread alone calls it.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/engine/cost.h"
#include "server/job.h"

namespace prefilld {

struct StagesCall {
  AttentionArgs args;  // all but index and report
  bool open = false;   // the method was left open: dense may still take its place
  DenseReason dense_reason = DenseReason::kNone;
  void *host_o = nullptr, *host_lse = nullptr;  // where o and lse are copied, or null
  size_t o_bytes = 0, lse_bytes = 0;
  std::vector<HeadReport> report;  // [sequences, q_heads], out
  PhaseSeconds phases{};           // out
};

class Stages {
 public:
  Stages(Backend& backend, CostModel& cost) : backend_(backend), cost_(cost) {}

  // Blocks for the length of the call. The index in call.args stays until the next one.
  absl::Status Run(StagesCall& call);
  // What the call teaches the cost model.
  void Observe(const StagesCall& call);
  // The index of the last call, as a caller gets it: to work.block_count and what follows. Blocks.
  absl::Status CopyIndex(const BlockIndexView& index, int heads, AttendWork& work);

 private:
  absl::Status Enqueue(StagesCall& call, const CostModel::Work& work);

  Backend& backend_;
  CostModel& cost_;
  // Of the call that runs; grow to the largest seen.
  Buffer index_count_, index_, report_;
  Buffer index_staging_;  // host: where a block index passes through on its way to a caller
};

// Whether a call of this policy measures the captured mass.
bool Measures(const SparsityPolicy& policy);
// Dense in the place of a sparse method that was left open.
SparsityPolicy DenseInsteadOf(SparsityPolicy policy);
// Computed share of all causal blocks of a call. report: [sequences, q_heads].
double MeanDensity(const AttentionShape& shape, const HeadReport* report);
// Makes a buffer of device memory at least so large; what it held is lost.
absl::Status Grow(Device& device, size_t bytes, Buffer& buffer);

}  // namespace prefilld
