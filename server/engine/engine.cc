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

// Layers of a prompt whose density says what the rest will have; the first are denser than most.
constexpr int kLayersToJudge = 4;

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
  return prefilld::Calibrate({backend_, stages_, clock_, models}, cost_);
}

absl::Status Engine::Reserve(const MemoryPlan& plan) {
  Device& device = backend_.device();
  reserved_ = ReservedBy(plan);
  if (plan.batches == 0) return absl::OkStatus();
  absl::Status status = Grow(device, Of(plan.held, Holding::kActivations), scratch_);
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

absl::Status Engine::EnsureScratch(const ModelInfo& info, int64_t tokens) {
  absl::Status status =
      Grow(backend_.device(), static_cast<size_t>(LayerScratchBytes(info, tokens)), scratch_);
  if (!status.ok()) return status;
  layer_ = SplitLayerScratch(info, tokens, scratch_.data());
  return absl::OkStatus();
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
  AttentionShape shape{info.activations,
                       info.q_heads,
                       info.kv_heads,
                       info.head_dim,
                       batch->prompts.cu_seqlens,
                       batch->prompts.cu_seqlens};
  const Decision decision = Decide(*batch->jobs[0], shape);
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
    auto memory = batches_->Take(batch->model->BatchBytes(batch->prompts.tokens()));
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

absl::Status Engine::RunLayer(Batch& batch) {
  absl::Status status = CheckStep();
  if (status.ok()) status = batch.status;
  if (status.ok()) status = Launch(batch);
  CollectUntil(status.ok() ? ahead_ : 0);
  if (batch.status.ok()) batch.status = status;
  if (!batch.status.ok()) CollectUntil(0);
  return batch.status;
}

absl::Status Engine::Launch(Batch& batch) {
  Reconsider(batch);
  absl::Status status = EnsureScratch(batch.model->info(), batch.prompts.tokens());
  if (!status.ok()) return status;
  Flight flight = {.batch = &batch,
                   .layer = batch.next_layer,
                   .call = LayerCall(batch),
                   .measured = MeasuresPhases(batch)};
  status = Prepare(flight.call);
  if (!status.ok()) return status;
  status = EnqueueLayer(flight);
  if (status.ok()) status = MarkStored(flight);
  if (!status.ok()) {
    status = flight.call.clock->Await(status);
    // No ticket will wait for what is on its way to caches that may go now.
    (void)backend_.device().Synchronize(backend_.device().download_stream());
    return AfterStep(status);
  }
  ++batch.next_layer;
  flights_.push_back(std::move(flight));
  return absl::OkStatus();
}

// K and V may still be on their way when the layer is computed, and those of the next layer then
// are behind them.
absl::Status Engine::MarkStored(Flight& flight) {
  auto mark = backend_.device().NewMark();
  if (!mark.ok()) return mark.status();
  flight.stored = *std::move(mark);
  return flight.stored->Record(backend_.device().download_stream());
}

bool Engine::Settle() {
  const bool any = !flights_.empty();
  CollectUntil(0);
  return any;
}

std::vector<std::pair<const Batch*, int>> Engine::OnTheirWay() const {
  std::vector<std::pair<const Batch*, int>> layers;
  for (const Flight& flight : flights_) layers.emplace_back(flight.batch, flight.layer);
  return layers;
}

void Engine::CollectUntil(size_t left) {
  while (flights_.size() > left) {
    Flight flight = std::move(flights_.front());
    flights_.pop_front();
    Batch& batch = *flight.batch;
    absl::Status status = Collect(flight);
    if (!status.ok()) (void)backend_.device().Synchronize(backend_.device().download_stream());
    if (batch.status.ok()) batch.status = std::move(status);
  }
}

absl::Status Engine::Collect(Flight& flight) {
  Batch& batch = *flight.batch;
  absl::Status status = AfterStep(flight.call.clock->AwaitEnd());
  if (status.ok()) status = batch.status;  // a layer without the one before is none
  if (status.ok()) status = stages_.Collect(flight.call);
  if (!status.ok()) return status;
  const PhaseSeconds phases = flight.call.clock->Read();
  if (flight.measured) Observe(flight, phases);
  Add(phases, batch.phases);
  ++batch.layers_done;
  batch.density += MeanDensity(flight.call.args.shape, flight.call.report.data());
  PostCommit(flight);
  return absl::OkStatus();
}

void Engine::Observe(const Flight& flight, const PhaseSeconds& phases) {
  Batch& batch = *flight.batch;
  stages_.Observe(flight.call, phases);
  const ModelInfo& info = batch.model->info();
  if (flight.layer + 1 == info.layers) return;  // it is not whole
  if (flight.call.args.policy.method == batch.policy.method) batch.layer_phases = phases;
  if (!cost_.LearnsFrom(info.activations)) return;
  cost_.ObserveLinear(batch.prompts.tokens(), info.layer_weights, Of(phases, Phase::kLinear));
}

// Where a layer is short its marks are a share of it, and it is like the one before: one in a few
// is measured phase by phase, the others are divided as it was. The last is unlike them.
bool Engine::MeasuresPhases(const Batch& batch) const {
  constexpr int64_t kShortTokens = 4096;
  constexpr int kMeasuredEvery = 8;
  return ahead_ == 0 || batch.prompts.tokens() >= kShortTokens || !batch.layer_phases ||
         batch.next_layer % kMeasuredEvery == 0 ||
         batch.next_layer + 1 == batch.model->info().layers;
}

// The rest of a prompt runs dense where its layers so far were not worth their selection.
void Engine::Reconsider(Batch& batch) {
  if (!batch.open || batch.layers_done < kLayersToJudge) return;
  const ModelInfo& info = batch.model->info();
  const std::vector<int64_t>& ends = batch.prompts.cu_seqlens;
  const CostModel::Work work =
      CostModel::WorkOf({info.activations, info.q_heads, info.kv_heads, info.head_dim, ends, ends});
  if (cost_.SelectingIsFaster(work, batch.density / batch.layers_done)) return;
  batch.policy = DenseInsteadOf(batch.policy);
  batch.dense_reason = DenseReason::kBelowCrossover;
  batch.open = false;
  batch.layer_phases.reset();
}

// Attention of the next layer, over what is in the scratch.
StagesCall Engine::LayerCall(const Batch& batch) {
  const ModelInfo& info = batch.model->info();
  const std::vector<int64_t>& ends = batch.prompts.cu_seqlens;
  StagesCall call;
  call.clock = &layer_clocks_[next_clock_];
  next_clock_ = (next_clock_ + 1) % std::size(layer_clocks_);
  call.dense_reason = batch.dense_reason;
  AttentionArgs& args = call.args;
  args.shape = {info.activations, info.q_heads, info.kv_heads, info.head_dim, ends, ends};
  args.policy = batch.policy;
  args.softmax_scale = 1 / std::sqrt(static_cast<double>(info.head_dim));
  args.q = {layer_.q.data, layer_.q.stride, info.head_dim};
  args.k = {layer_.k.data, layer_.k.stride, info.head_dim};
  args.v = {layer_.v.data, layer_.v.stride, info.head_dim};
  args.o = {layer_.o.data, layer_.o.stride, info.head_dim};
  if (batch.jobs.size() == 1) args.cancelled = &batch.jobs[0]->cancelled;
  return call;
}

// All of a layer, phase by phase.
absl::Status Engine::EnqueueLayer(Flight& flight) {
  Batch& batch = *flight.batch;
  Transformer& model = *batch.model;
  const int layer = flight.layer;
  StepClock& clock = *flight.call.clock;
  absl::Status status;
  if (flights_.empty() || layer == 0) {  // what began the batch lies between it and a flight
    status = clock.Start();
  } else {
    clock.StartAfter(*flights_.back().call.clock);
  }
  if (!flight.measured) clock.MarkTheEndOnly(*batch.layer_phases);
  if (status.ok()) status = model.ProjectQkv(layer, batch.prompts, layer_, kStream);
  if (status.ok()) status = clock.End(Phase::kLinear);
  if (status.ok()) status = StoreKv(batch, layer);
  if (status.ok()) status = clock.End(Phase::kHandoff);
  if (status.ok()) status = stages_.Enqueue(flight.call);
  if (status.ok()) status = FinishLayer(batch, layer);
  return status.ok() ? clock.Finish(Phase::kLinear) : status;
}

// Of the last layer nothing follows but the logits that were asked for, each of one row.
absl::Status Engine::FinishLayer(Batch& batch, int layer) {
  const bool last = layer + 1 == batch.model->info().layers;
  std::vector<RowRange> rows;
  if (!last) rows.push_back({0, batch.prompts.tokens()});
  for (size_t s = 0; last && s < batch.jobs.size(); ++s) {
    if (batch.jobs[s]->prefill->return_logits) {
      rows.push_back({batch.prompts.cu_seqlens[s + 1] - 1, 1});
    }
  }
  absl::Status status;
  for (size_t i = 0; i < rows.size() && status.ok(); ++i) {
    status = batch.model->FinishLayer(layer, batch.prompts, layer_, rows[i], kStream);
  }
  return status;
}

void Engine::PostCommit(Flight& flight) {
  const Batch& batch = *flight.batch;
  const int layer = flight.layer, heads = batch.model->info().q_heads;
  std::vector<HeadReport>& report = flight.call.report;  // [jobs, heads]
  LayerTicket ticket{.layer = layer, .on_failed = batch.on_failed};
  for (size_t s = 0; s < batch.jobs.size(); ++s) {
    Job& job = *batch.jobs[s];
    const HeadReport* entries = report.data() + s * heads;
    std::copy_n(entries, heads, job.report.entries.begin() + int64_t{layer} * heads);
    LayerTicket::Part part{.job = batch.jobs[s]};
    for (int h = 0; h < heads; ++h) {
      part.density += entries[h].density;
      part.captured_mass += entries[h].captured_mass;
    }
    part.density /= heads;
    part.captured_mass /= heads;
    if (flight.call.args.policy.method == kOpenMethod) {
      cost_.ObserveDensity((job.tokens() + kKvBlockTokens - 1) / kKvBlockTokens, part.density);
    }
    ticket.parts.push_back(std::move(part));
  }
  ticket.report = std::move(report);
  completions_.Post(
      std::move(flight.stored),
      [this, ticket = std::move(ticket)](const absl::Status& work) { Commit(ticket, work); });
}

void Engine::Commit(const LayerTicket& ticket, const absl::Status& work) {
  for (size_t s = 0; s < ticket.parts.size(); ++s) {
    const LayerTicket::Part& part = ticket.parts[s];
    Job& job = *part.job;
    PrefillWork& prefill = *job.prefill;
    if (prefill.committed.ok()) prefill.committed = work;  // a layer without the one before is none
    if (!prefill.committed.ok()) {
      if (ticket.on_failed) ticket.on_failed(part.job, prefill.committed);
      continue;
    }
    const ModelInfo& info = prefill.model->info();
    const bool measured = job.report.captured_mass_measured;
    for (int h = 0; h < info.q_heads; ++h) {
      ObserveHead(metrics_, info.name, ticket.report[s * info.q_heads + h], measured);
    }
    metrics_.LayerDensity(info.name, ticket.layer, part.density);
    if (ticket.layer == 0) {
      metrics_.time_to_first_layer.Observe(absl::ToDoubleSeconds(Since(job.arrival)));
    }
    prefill.cache->Commit(ticket.layer);
    job.sink->OnLayerReady(ticket.layer, part.density, measured ? part.captured_mass : 0);
  }
}

// Writes the layer's K and V, rounded to the cache's dtype, to where each job's cache has it.
absl::Status Engine::StoreKv(Batch& batch, int layer) {
  const ModelInfo& info = batch.model->info();
  WriteKvArgs args{.k = layer_.k,
                   .v = layer_.v,
                   .kv_heads = info.kv_heads,
                   .head_dim = info.head_dim,
                   .copies = backend_.device().download_stream()};
  for (size_t s = 0; s < batch.jobs.size(); ++s) {
    const int64_t begin = batch.prompts.cu_seqlens[s];
    args.parts.push_back({.first = begin,
                          .tokens = batch.prompts.cu_seqlens[s + 1] - begin,
                          .target = batch.jobs[s]->prefill->cache->Target(layer)});
  }
  return (*backend_.ops())->WriteKv(args, kStream);
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

absl::Status Engine::EnqueueAttend(StagesCall& call) {
  Device& device = backend_.device();
  absl::Status status = clock_.Start();
  if (status.ok()) status = device.Wait(kStream, device.upload_stream());
  if (status.ok()) status = clock_.End(Phase::kUpload);
  return status.ok() ? stages_.Enqueue(call) : status;
}

absl::Status Engine::RunAttend(Job& job) {
  absl::Status status = CheckStep();
  if (!status.ok()) return status;
  AttendWork& work = *job.attend;
  const AttentionShape& shape = work.shape;
  const int heads = shape.q_heads;
  StagesCall call;
  call.clock = &clock_;
  AttentionArgs& args = call.args;
  const Decision decision = Decide(job, shape);
  args.policy = decision.policy;
  call.open = decision.open;
  call.dense_reason = decision.dense_reason;
  args.shape = shape;
  args.softmax_scale = work.softmax_scale;
  args.q = {work.q.data(), int64_t{heads} * shape.head_dim, shape.head_dim};
  args.k = {work.k.data(), int64_t{shape.kv_heads} * shape.head_dim, shape.head_dim};
  args.v = {work.v.data(), int64_t{shape.kv_heads} * shape.head_dim, shape.head_dim};
  args.o = {work.o.data(), int64_t{heads} * shape.head_dim, shape.head_dim};
  args.lse = work.lse.as<float>();
  args.cancelled = &job.cancelled;
  call.host_o = work.host_o.data();
  call.o_bytes = work.o.bytes();
  call.host_lse = work.host_lse.data();
  call.lse_bytes = work.lse.bytes();
  call.host_count = work.host_count.data();
  call.host_index = work.host_index.data();
  status = Prepare(call);
  if (!status.ok()) return status;
  status = EnqueueAttend(call);
  CollectUntil(0);
  status = AfterStep(clock_.Await(status));
  if (status.ok()) status = stages_.Collect(call);
  if (!status.ok()) return status;
  stages_.Observe(call, clock_.Read());
  Add(clock_.Read(), job.phases);
  job.report = {.layers = shape.sequences(),
                .heads = heads,
                .entries = std::move(call.report),
                .captured_mass_measured = Measures(args.policy)};
  return absl::OkStatus();
}

}  // namespace prefilld
