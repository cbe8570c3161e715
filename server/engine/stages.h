// One call of the waist: estimate, select, measure, attend, over the buffers that the stages need
// besides the caller's tensors. Owned by the engine, whose thread alone calls it.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/engine/cost.h"
#include "server/engine/step_clock.h"
#include "server/job.h"

namespace prefilld {

// A block index that outlives its call, as stage 3 of it is divided among several.
struct KeptIndex {
  Buffer count, index;
};

struct StagesCall {
  // Of several calls over one index the first selects, the others attend.
  enum class Of { kAll, kSelection, kAttention } of = Of::kAll;
  KeptIndex* kept = nullptr;   // theirs
  StepClock* clock = nullptr;  // of the step that the call belongs to
  AttentionArgs args;          // all but index and report
  bool open = false;           // the method was left open: dense may still take its place
  DenseReason dense_reason = DenseReason::kNone;
  // Copied when the call is done: o and lse of all heads that there are, this call's index. Null:
  // not.
  void *host_o = nullptr, *host_lse = nullptr, *host_count = nullptr, *host_index = nullptr;
  const void *o = nullptr, *lse = nullptr;
  size_t o_bytes = 0, lse_bytes = 0;
  std::vector<HeadReport> report;  // [sequences, q_heads], out
};

class Stages {
 public:
  Stages(Backend& backend, CostModel& cost) : backend_(backend), cost_(cost) {}

  // Takes memory before the first call: those that need no more take none. Each of two reports.
  absl::Status Reserve(size_t count_bytes, size_t index_bytes, size_t report_bytes);
  // Gives back what grew with the shapes of calls, the backend's workspace too; waits for the
  // device.
  absl::Status Release();
  // Takes what memory is missing. Before anything of the call's step is enqueued. Its report stays
  // until the next call but one is prepared.
  absl::Status Prepare(StagesCall& call);
  // All of a call, phase by phase; waits only where the method is open, after selecting. CANCELLED
  // where stage 3 was left to the host and may have stopped early.
  absl::Status Enqueue(StagesCall& call);
  // After the wait for the step: call.report.
  absl::Status Collect(StagesCall& call);

  // What the call teaches the cost model.
  void Observe(const StagesCall& call, const PhaseSeconds& phases);

 private:
  absl::Status EstimateAndSelect(StagesCall& call);
  absl::Status Select(StagesCall& call);
  absl::Status CopyOut(const StagesCall& call);

  Backend& backend_;
  CostModel& cost_;
  // Grow to the largest call seen. Calls follow each other on the stream; a report is read when the
  // next call may have been enqueued.
  Buffer index_count_, index_, reports_[2];
  int next_report_ = 0;
};

// Dense in the place of a sparse method that was left open.
SparsityPolicy DenseInsteadOf(SparsityPolicy policy);
// Computed share of all causal blocks of a call. report: [sequences, q_heads].
double MeanDensity(const AttentionShape& shape, const HeadReport* report);

}  // namespace prefilld
