#include "server/engine/stages.h"

#include <algorithm>
#include <utility>

namespace prefilld {
namespace {

constexpr Stream kStream{};

size_t ReportEntries(const AttentionArgs& args) {
  return static_cast<size_t>(args.shape.q_heads) * args.shape.sequences();
}

absl::Status CheckCancelled(const AttentionArgs& args) {
  return Cancelled(args) ? absl::CancelledError("cancelled") : absl::OkStatus();
}

}  // namespace

SparsityPolicy DenseInsteadOf(SparsityPolicy policy) {
  policy.method = Method::kDense;
  policy.measure_captured_mass = false;
  policy.min_captured_mass = 0;
  return policy;
}

double MeanDensity(const AttentionShape& shape, const HeadReport* report) {
  double computed = 0, all = 0;
  for (int s = 0; s < shape.sequences(); ++s) {
    const double work = CostModel::WorkOf(1, 1, shape.cu_seqlens_q[s + 1] - shape.cu_seqlens_q[s],
                                          shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s])
                            .dense;
    for (int h = 0; h < shape.q_heads; ++h)
      computed += work * report[s * shape.q_heads + h].density;
    all += work * shape.q_heads;
  }
  return computed / all;
}

absl::Status Stages::Reserve(size_t count_bytes, size_t index_bytes, size_t report_bytes) {
  Device& device = backend_.device();
  absl::Status status = Grow(device, count_bytes, index_count_);
  if (status.ok()) status = Grow(device, index_bytes, index_);
  for (Buffer& report : reports_) {
    if (status.ok()) status = GrowHost(device, report_bytes, report);
  }
  return status;
}

absl::Status Stages::Release() {
  absl::Status status = prefilld::Release(backend_.device(), index_count_);
  if (status.ok()) status = prefilld::Release(backend_.device(), index_);
  return status.ok() ? backend_.ReleaseWorkspace() : status;
}

absl::Status Stages::Prepare(StagesCall& call) {
  AttentionArgs& args = call.args;
  Device& device = backend_.device();
  const auto sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  args.index.rows = TotalRows(sequences);
  args.index.stride = MaxKeyBlocks(sequences);
  const size_t rows = static_cast<size_t>(args.shape.q_heads) * args.index.rows;
  Buffer& report = reports_[next_report_];
  Buffer& count = call.kept != nullptr ? call.kept->count : index_count_;
  Buffer& index = call.kept != nullptr ? call.kept->index : index_;
  absl::Status status = Grow(device, rows * sizeof(int32_t), count);
  if (status.ok()) status = Grow(device, rows * args.index.stride * sizeof(uint16_t), index);
  if (status.ok()) status = GrowHost(device, ReportEntries(args) * sizeof(HeadReport), report);
  if (status.ok()) {
    status = backend_.ReserveWorkspace(backend_.WorkspaceBytes(args.shape, args.policy));
  }
  if (!status.ok()) return status;
  next_report_ = 1 - next_report_;
  args.index.count = count.as<int32_t>();
  args.index.index = index.as<uint16_t>();
  args.report = report.as<HeadReport>();
  return absl::OkStatus();
}

absl::Status Stages::Enqueue(StagesCall& call) {
  AttentionArgs& args = call.args;
  StepClock& clock = *call.clock;
  absl::Status status;
  if (call.of != StagesCall::Of::kAttention) status = EstimateAndSelect(call);
  if (status.ok() && call.of != StagesCall::Of::kSelection) {
    status = backend_.Attend(args, kStream);
    if (status.ok()) status = clock.End(Phase::kAttention);
  }
  if (status.ok()) status = CopyOut(call);
  return status.ok() ? CheckCancelled(args) : status;
}

// What was cancelled in one stage has left nothing for the next.
absl::Status Stages::EstimateAndSelect(StagesCall& call) {
  AttentionArgs& args = call.args;
  StepClock& clock = *call.clock;
  const bool selects = args.policy.method != Method::kDense;  // else it is part of attention
  absl::Status status = backend_.EstimatePattern(args, kStream);
  if (status.ok() && selects) status = clock.End(Phase::kEstimate);
  if (status.ok()) status = CheckCancelled(args);
  if (status.ok()) status = Select(call);
  if (status.ok()) status = CheckCancelled(args);
  if (status.ok() && Measures(args)) status = backend_.MeasureCapturedMass(args, kStream);
  if (status.ok() && selects) status = clock.End(Phase::kSelect);
  if (status.ok() && !selects && call.of == StagesCall::Of::kSelection) {
    status = clock.End(Phase::kAttention);
  }
  return status;
}

absl::Status Stages::CopyOut(const StagesCall& call) {
  const AttentionArgs& args = call.args;
  const size_t rows = static_cast<size_t>(args.shape.q_heads) * args.index.rows;
  const struct {
    void* host;
    const void* from;
    size_t bytes;
  } outputs[] = {{call.host_o, call.o, call.o_bytes},
                 {call.host_lse, call.lse, call.lse_bytes},
                 {call.host_count, args.index.count, rows * sizeof(int32_t)},
                 {call.host_index, args.index.index, rows * args.index.stride * sizeof(uint16_t)}};
  bool any = false;
  for (const auto& [host, from, bytes] : outputs) {
    if (host == nullptr) continue;
    any = true;
    absl::Status status = backend_.device().Copy(host, from, bytes, kStream);
    if (!status.ok()) return status;
  }
  return any ? call.clock->End(Phase::kHandoff) : absl::OkStatus();
}

absl::Status Stages::Select(StagesCall& call) {
  AttentionArgs& args = call.args;
  absl::Status status = backend_.SelectBlocks(args, kStream);
  if (!status.ok() || !call.open || args.policy.method == Method::kDense) return status;
  // What was kept is known now: where that is too much, only the selection was in vain.
  status = backend_.device().Synchronize(kStream);
  if (!status.ok()) return status;
  const CostModel::Work work = CostModel::WorkOf(args.shape);
  const double density = MeanDensity(args.shape, args.report);
  if (args.policy.method == kOpenMethod) cost_.ObserveDensity(work.k_blocks, density);
  if (cost_.SparseIsFaster(work, density)) return absl::OkStatus();
  args.policy = DenseInsteadOf(args.policy);
  call.dense_reason = DenseReason::kBelowCrossover;
  status = backend_.EstimatePattern(args, kStream);
  return status.ok() ? backend_.SelectBlocks(args, kStream) : status;
}

absl::Status Stages::Collect(StagesCall& call) {
  const AttentionArgs& args = call.args;
  if (absl::Status cancelled = CheckCancelled(args); !cancelled.ok()) return cancelled;
  call.report.assign(args.report, args.report + ReportEntries(args));
  if (call.dense_reason != DenseReason::kNone) {
    for (HeadReport& entry : call.report) entry.dense_reason = call.dense_reason;
  }
  return absl::OkStatus();
}

void Stages::Observe(const StagesCall& call, const PhaseSeconds& phases) {
  const AttentionShape& shape = call.args.shape;
  if (!cost_.LearnsFrom(shape.dtype)) return;
  const CostModel::Work work = CostModel::WorkOf(shape);
  const double select = Of(phases, Phase::kSelect), attention = Of(phases, Phase::kAttention);
  if (call.args.policy.method != Method::kDense) {
    // What is open becomes joint or dense: the others' selection says nothing about that.
    if (call.args.policy.method == kOpenMethod) {
      cost_.ObserveSelect(work, Of(phases, Phase::kEstimate) + select);
    }
    cost_.ObserveSparse(work, MeanDensity(shape, call.report.data()), attention);
  } else if (!call.open) {  // else the time is that of both
    cost_.ObserveDense(work, attention);
  }
}

}  // namespace prefilld
