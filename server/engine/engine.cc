#include "server/engine/engine.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/engine/calibration.h"
#include "server/kv/kv_cache.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

constexpr Stream kStream{};

CostModel::Choice ChoiceOf(const Job& job) {
  if (job.policy.method == Method::kDense) return CostModel::Choice::kDense;
  return job.method_unspecified ? CostModel::Choice::kOpen : CostModel::Choice::kSparse;
}

}  // namespace

void ObserveHead(Metrics& metrics, const std::string& model, const HeadReport& head,
                 bool measured) {
  metrics.HeadDensity(model, head.pattern, head.density);
  if (measured) metrics.CapturedMass(model, head.captured_mass);
  if (head.dense_reason != DenseReason::kNone) metrics.DenseFallback(head.dense_reason);
}

absl::Status Engine::Calibrate(bool models) {
  absl::Status status = prefilld::Calibrate({backend_, stages_, clock_, models}, cost_);
  if (status.ok() && backend_.device().host_memory()) calibrated_models_ = models;
  return status;
}

// What fails here fails for a job too, which has somebody to tell.
void Engine::Recalibrate() {
  (void)prefilld::Recalibrate({backend_, stages_, clock_, *calibrated_models_}, cost_);
}

absl::Status Engine::Reserve(const MemoryPlan& plan) {
  Device& device = backend_.device();
  reserved_ = ReservedBy(plan);
  if (plan.batches == 0) return absl::OkStatus();
  absl::Status status = Grow(device, Of(plan.held, Holding::kActivations), scratch_[1].memory);
  if (status.ok()) {
    status = Grow(device, Of(plan.held, Holding::kShortActivations), scratch_[0].memory);
  }
  if (status.ok()) status = ReserveStages();
  if (status.ok()) status = (*backend_.ops())->ReserveWriteKv(Of(plan.held, Holding::kKvOut));
  if (!status.ok()) return status;
  auto memory = device.Allocate(plan.batches);
  if (!memory.ok()) return memory.status();
  batches_ = std::make_unique<Arena>(*std::move(memory));
  return absl::OkStatus();
}

// What the stages have of the plan.
absl::Status Engine::ReserveStages() {
  const auto of = [&](Holding held) { return reserved_ ? Of(reserved_->held, held) : 0; };
  absl::Status status =
      stages_.Reserve(of(Holding::kCounts), of(Holding::kIndex), of(Holding::kReports));
  return status.ok() ? backend_.ReserveWorkspace(of(Holding::kWorkspace)) : status;
}

// A shape that nobody planned grows what the stages have. Where there is too little for that, the
// shapes before it may have grown something else: all of that is given back.
absl::Status Engine::Prepare(StagesCall& call) {
  absl::Status status = stages_.Prepare(call);
  if (!absl::IsResourceExhausted(status)) return status;
  status = stages_.Release();
  if (status.ok()) status = ReserveStages();
  return status.ok() ? stages_.Prepare(call) : status;
}

bool Engine::HasRoom(const Transformer& model, int64_t tokens) const {
  return batches_ == nullptr || batches_->Fits(model.BatchBytes(tokens));
}

// Dense instead of an unspecified method where selecting would cost more than it saves.
Engine::Decision Engine::Decide(const Job& job, const AttentionShape& shape) {
  if (!job.method_unspecified) return {.policy = job.policy};
  const CostModel::Work work = CostModel::WorkOf(shape);
  if (cost_.SparseIsFaster(work) || cost_.WorthATry(work)) {
    return {.policy = job.policy, .open = job.policy.method != Method::kDense};
  }
  return {.policy = DenseInsteadOf(job.policy), .dense_reason = DenseReason::kBelowCrossover};
}

absl::Status Engine::CheckDevice() const {
  const std::string_view fault = backend_.device().fault();
  if (fault.empty()) return absl::OkStatus();
  return RetryLater(absl::StatusCode::kUnavailable, "device_lost",
                    absl::StrCat("the device is lost (", std::string(fault), "): this server ends"),
                    absl::Seconds(5));
}

void Engine::NoteFault() {
  const std::string_view fault = backend_.device().fault();
  if (fault_noted_ || fault.empty()) return;
  fault_noted_ = true;
  metrics_.GpuFault(fault);
}

// How a step went, when it was waited for: what fails on a device that is lost fails for that.
absl::Status Engine::AfterStep(absl::Status step) {
  NoteFault();
  const absl::Status lost = CheckDevice();
  return step.ok() || lost.ok() ? step : lost;
}

absl::Status Engine::CheckStep() {
  NoteFault();  // an RPC thread may have met it first
  return CheckDevice();
}

double Engine::PredictSeconds(const Job& job, int layers_done) const {
  if (job.attend) {
    const AttentionShape& shape = job.attend->shape;
    return cost_.Slowness(shape.dtype) *
           cost_.AttentionSeconds(CostModel::WorkOf(shape), ChoiceOf(job));
  }
  return (job.prefill->model->info().layers - layers_done) * PredictLayerSeconds(job);
}

double Engine::PredictLayerSeconds(const Job& prefill) const {
  const ModelInfo& info = prefill.prefill->model->info();
  const int64_t tokens = prefill.tokens();
  const CostModel::Work work = CostModel::WorkOf(info.q_heads, info.head_dim, tokens, tokens);
  return cost_.Slowness(info.activations) * (cost_.AttentionSeconds(work, ChoiceOf(prefill)) +
                                             cost_.LinearSeconds(tokens, info.layer_weights));
}

absl::StatusOr<std::unique_ptr<Batch>> Engine::Begin(std::vector<std::shared_ptr<Job>> jobs) {
  if (absl::Status lost = CheckStep(); !lost.ok()) return lost;
  auto batch = std::make_unique<Batch>();
  batch->jobs = std::move(jobs);
  batch->model = batch->jobs[0]->prefill->model;
  batch->prompts.cu_seqlens = {0};
  for (const auto& job : batch->jobs) {
    const auto& ids = job->prefill->token_ids;
    batch->prompts.token_ids.insert(batch->prompts.token_ids.end(), ids.begin(), ids.end());
    batch->prompts.cu_seqlens.push_back(static_cast<int64_t>(batch->prompts.token_ids.size()));
  }
  const ModelInfo& info = batch->model->info();
  const Decision decision = Decide(*batch->jobs[0], ShapeOf(*batch));
  batch->policy = decision.policy;
  batch->dense_reason = decision.dense_reason;
  batch->open = decision.open;
  for (const auto& job : batch->jobs) {
    job->report.layers = info.layers;
    job->report.heads = info.q_heads;
    job->report.entries.resize(static_cast<size_t>(info.layers) * info.q_heads);
    job->report.captured_mass_measured = Measures(batch->policy);
  }
  if (batches_ != nullptr) {
    // Short ones lie together, so that there is a hole for a long one where one was.
    const int64_t tokens = batch->prompts.tokens();
    auto memory = batches_->Take(batch->model->BatchBytes(tokens),
                                 Passes(tokens) ? Arena::From::kEnd : Arena::From::kBegin);
    if (!memory.ok()) return memory.status();
    batch->prompts.memory = *std::move(memory);
  }
  absl::Status status = batch->model->Begin(batch->prompts, kStream);
  if (!status.ok()) {
    (void)backend_.device().Synchronize(kStream);  // it may use what goes with the batch
    return AfterStep(status);
  }
  return batch;
}

absl::Status Engine::Finish(Batch& batch) {
  absl::Status status = clock_.Start();
  for (size_t s = 0; s < batch.jobs.size() && status.ok(); ++s) {
    PrefillWork& work = *batch.jobs[s]->prefill;
    if (!work.return_logits) continue;
    work.logits.resize(batch.model->info().vocab_size);
    status = batch.model->Logits(
        batch.prompts,
        {.row = batch.prompts.cu_seqlens[s + 1] - 1, .rows = 1, .out = work.logits.data()},
        kStream);
  }
  if (status.ok()) status = clock_.End(Phase::kLinear);
  CollectUntil(0);
  status = AfterStep(clock_.Await(status));
  if (!batch.status.ok()) status = batch.status;
  if (status.ok()) Add(clock_.Read(), batch.phases);
  for (const auto& job : batch.jobs) Add(batch.phases, job->phases);
  return status;
}

void Engine::Remove(Batch& batch, size_t index) {
  CollectUntil(0);  // what is on its way has the rows of all
  Add(batch.phases, batch.jobs[index]->phases);
  absl::Status status = batch.model->Remove(batch.prompts, index, kStream);
  if (batch.status.ok()) batch.status = std::move(status);
  batch.jobs.erase(batch.jobs.begin() + static_cast<std::ptrdiff_t>(index));
}

// A selection sees all queries; and the threads of a CPU share out those of a call.
bool Engine::DividesQueries(const SparsityPolicy& policy) const {
  return policy.method == Method::kDense && !backend_.device().host_memory();
}

std::unique_ptr<AttendRun> Engine::BeginAttend(std::shared_ptr<Job> job) {
  const AttentionShape& shape = job->attend->shape;
  const Decision decision = Decide(*job, shape);
  auto run = std::make_unique<AttendRun>();
  run->policy = decision.policy;
  run->dense_reason = decision.dense_reason;
  run->open = decision.open;
  const bool by_queries = DividesQueries(run->policy) && shape.sequences() == 1 &&
                          job->attend->host_count.data() == nullptr;
  AttentionWork work = {.q_heads = shape.q_heads,
                        .kv_heads = shape.kv_heads,
                        .seconds = PredictSeconds(*job),
                        .by_queries = by_queries ? shape.total_q() : 0,
                        .prefix = shape.total_k() - shape.total_q()};
  if (backend_.device().host_memory()) {
    for (const SequenceBlocks& blocks : SplitIntoBlocks(shape, run->policy.block_size)) {
      for (int64_t row = 0; row < blocks.q_blocks; ++row) {
        work.row_blocks.push_back(blocks.first_q_block + row + 1);
      }
    }
    work.row_seconds = host_step_seconds_;
  }
  run->parts = DivideAttention(work, step_seconds_);
  run->report.resize(static_cast<size_t>(shape.sequences()) * shape.q_heads);
  run->job = std::move(job);
  return run;
}

// Attention of the next part.
StagesCall Engine::PartCall(AttendRun& run) {
  const AttendWork& work = *run.job->attend;
  const AttendRange& part = run.parts[run.next_part];
  const AttentionShape& shape = work.shape;
  const int d = shape.head_dim;
  StagesCall call;
  call.clock = &clock_;
  call.open = run.open;
  call.dense_reason = run.dense_reason;
  AttentionArgs& args = call.args;
  args.policy = run.policy;
  args.shape = shape;
  args.softmax_scale = work.softmax_scale;
  args.q = {work.q.data(), int64_t{shape.q_heads} * d, d};
  args.k = {work.k.data(), int64_t{shape.kv_heads} * d, d};
  args.v = {work.v.data(), int64_t{shape.kv_heads} * d, d};
  args.o = {work.o.data(), int64_t{shape.q_heads} * d, d};
  args.lse = work.lse.as<float>();
  NarrowTo(part, args);
  args.first_row = part.rows.first;
  args.row_count = part.rows.count;
  args.cancelled = &run.job->cancelled;
  if (part.selection || part.rows.count > 0) {
    call.of = part.selection ? StagesCall::Of::kSelection : StagesCall::Of::kAttention;
    call.kept = &run.kept;
  }
  return call;
}

absl::Status Engine::EnqueueAttend(const AttendRun& run, StagesCall& call) {
  Device& device = backend_.device();
  absl::Status status = clock_.Start();
  if (status.ok() && run.next_part == 0) {
    status = device.Wait(kStream, device.upload_stream());
    if (status.ok()) status = clock_.End(Phase::kUpload);
  }
  return status.ok() ? stages_.Enqueue(call) : status;
}

// Where the part's index goes; with the last part all of o and lse is there.
void Engine::SetOutputs(const AttendRun& run, StagesCall& call) {
  const AttendWork& work = *run.job->attend;
  if (work.host_count.data() != nullptr && call.of != StagesCall::Of::kAttention) {
    const int64_t rows = run.parts[run.next_part].first * call.args.index.rows;
    call.host_count = work.host_count.as<int32_t>() + rows;
    call.host_index = work.host_index.as<uint16_t>() + rows * call.args.index.stride;
  }
  if (run.next_part + 1 < run.parts.size()) return;
  call.host_o = work.host_o.data();
  call.o = work.o.data();
  call.o_bytes = work.o.bytes();
  call.host_lse = work.host_lse.data();
  call.lse = work.lse.data();
  call.lse_bytes = work.lse.bytes();
}

// What a part has found out, and what it teaches: of a head in several, all of them.
void Engine::CollectAttend(AttendRun& run, StagesCall& call) {
  const PhaseSeconds phases = clock_.Read();
  Add(phases, run.job->phases);
  Add(phases, run.head_phases);
  // What the first heads kept decides for the others.
  run.policy = call.args.policy;
  run.dense_reason = call.dense_reason;
  run.open = false;
  const AttendRange& heads = run.parts[run.next_part];
  const AttentionShape& shape = run.job->attend->shape;
  for (int sequence = 0; sequence < shape.sequences(); ++sequence) {
    const auto ours = run.report.begin() + int64_t{sequence} * shape.q_heads + heads.first;
    const auto theirs = call.report.begin() + int64_t{sequence} * heads.count;
    if (call.of == StagesCall::Of::kAttention) {
      std::copy_n(ours, heads.count, theirs);
    } else {
      std::copy_n(theirs, heads.count, ours);
    }
  }
  const size_t next = run.next_part + 1;
  if (next < run.parts.size() && run.parts[next].rows.count > 0) return;
  stages_.Observe(call, run.head_phases);
  run.head_phases = {};
}

absl::Status Engine::RunStep(AttendRun& run) {
  absl::Status status = CheckStep();
  if (!status.ok()) return status;
  StagesCall call = PartCall(run);
  status = Prepare(call);
  if (!status.ok()) return status;
  SetOutputs(run, call);
  status = EnqueueAttend(run, call);
  CollectUntil(0);
  status = AfterStep(clock_.Await(status));
  if (status.ok()) status = stages_.Collect(call);
  if (!status.ok()) return status;
  CollectAttend(run, call);
  ++run.next_part;
  if (!run.done()) return absl::OkStatus();
  Job& job = *run.job;
  const AttentionShape& shape = job.attend->shape;
  job.report = {.layers = shape.sequences(),
                .heads = shape.q_heads,
                .entries = std::move(run.report),
                .captured_mass_measured = Measures(run.policy)};
  return absl::OkStatus();
}

}  // namespace prefilld
