// Engine's steps of batches: a layer, or a part of one.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "server/engine/engine.h"
#include "server/kv/kv_cache.h"

namespace prefilld {
namespace {

constexpr Stream kStream{};

// Layers of a prompt whose density says what the rest will have; the first are denser than most.
constexpr int kLayersToJudge = 4;

}  // namespace

absl::Status Engine::RunStep(Batch& batch) {
  absl::Status status = CheckStep();
  if (status.ok()) status = batch.status;
  if (status.ok()) status = Launch(batch);
  CollectUntil(status.ok() ? ahead_ : 0);
  if (batch.status.ok()) batch.status = status;
  if (!batch.status.ok()) CollectUntil(0);
  return batch.status;
}

// Takes q, k, v and o, until the layer's last part is enqueued: whoever has them next is behind it
// on the stream.
absl::Status Engine::BeginLayer(Batch& batch) {
  Reconsider(batch);
  const ModelInfo& info = batch.model->info();
  const int64_t tokens = batch.prompts.tokens();
  ActiveScratch& scratch = scratch_[SlotOf(tokens)];
  if (scratch.in_use) return absl::InternalError("another batch is in the middle of a layer");
  const int turns = ScratchTurns(tokens, backend_.device().host_memory());
  absl::Status status =
      Grow(backend_.device(), static_cast<size_t>(turns * LayerScratchBytes(info, tokens)),
           scratch.memory);
  if (!status.ok()) return status;
  scratch.turn = (scratch.turn + 1) % turns;
  // What this waits is counted as the projection's: copies are as slow as layers only where a model
  // has as many kv heads as query heads.
  const auto& stored = scratch.stored[scratch.turn];
  if (stored != nullptr) status = backend_.device().Wait(kStream, *stored);
  if (!status.ok()) return status;
  char* memory = scratch.memory.as<char>() + scratch.turn * (scratch.memory.bytes() / turns);
  scratch.rows = SplitLayerScratch(info, tokens, memory);
  scratch.in_use = true;
  batch.scratch.reset(&scratch);
  batch.parts = PartsOf(batch);
  batch.next_part = 0;
  return absl::OkStatus();
}

std::vector<LayerPart> Engine::PartsOf(const Batch& batch) const {
  const ModelInfo& info = batch.model->info();
  const int64_t tokens = batch.prompts.tokens();
  const bool last = batch.next_layer + 1 == info.layers;
  if (batch.jobs.size() > 1) return {WholeLayer(info, tokens, last)};  // short ones
  const double slowness = cost_.Slowness(info.activations);
  const auto linear = [&](int64_t weights) {
    return slowness * cost_.LinearSeconds(tokens, weights);
  };
  const auto choice = batch.policy.method == Method::kDense ? CostModel::Choice::kDense
                                                            : CostModel::Choice::kSparse;
  const CostModel::Work attention = CostModel::WorkOf(ShapeOf(batch));
  return DivideLayer({.info = info,
                      .tokens = tokens,
                      .tile_tokens = batch.model->tile_tokens(),
                      .last = last,
                      .by_queries = DividesQueries(batch.policy),
                      .project = linear(info.qkv_weights),
                      .attend = slowness * cost_.AttentionSeconds(attention, choice),
                      .finish = last ? 0 : linear(info.layer_weights - info.qkv_weights)},
                     step_seconds_);
}

absl::Status Engine::Launch(Batch& batch) {
  if (batch.scratch == nullptr) {
    if (absl::Status status = BeginLayer(batch); !status.ok()) return status;
  }
  const LayerPart& part = batch.parts[batch.next_part];
  Flight flight = {.batch = &batch,
                   .layer = batch.next_layer,
                   .part = part,
                   .ends_layer = batch.next_part + 1 == batch.parts.size(),
                   .call = PartCall(batch, part.attend),
                   .measured = MeasuresPhases(batch)};
  absl::Status status = part.attend.count > 0 ? Prepare(flight.call) : absl::OkStatus();
  if (!status.ok()) return status;
  status = EnqueuePart(flight);
  if (!status.ok()) {
    status = flight.call.clock->Await(status);
    // No ticket will wait for what is on its way to caches that may go now.
    (void)backend_.device().Synchronize(backend_.device().download_stream());
    return AfterStep(status);
  }
  ++batch.next_part;
  if (flight.ends_layer) {
    ++batch.next_layer;
    batch.scratch.reset();
  }
  flights_.push_back(std::move(flight));
  return absl::OkStatus();
}

void Engine::Leave(std::unique_ptr<Batch> batch) {
  CollectUntil(0);
  if (batch->stored == nullptr) return;  // else K and V of a layer that will not be whole
  completions_.Post(std::move(batch->stored), [](const absl::Status&) {});
}

bool Engine::Settle() {
  const bool any = !flights_.empty();
  CollectUntil(0);
  return any;
}

std::vector<std::pair<const Batch*, int>> Engine::OnTheirWay() const {
  std::vector<std::pair<const Batch*, int>> layers;
  for (const Flight& flight : flights_) {
    const std::pair<const Batch*, int> layer(flight.batch, flight.layer);
    if (layers.empty() || layers.back() != layer) layers.push_back(layer);
  }
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
  if (status.ok()) status = batch.status;  // a part without the one before is none
  if (status.ok() && flight.part.attend.count > 0) status = stages_.Collect(flight.call);
  if (!status.ok()) return status;
  const PhaseSeconds phases = flight.call.clock->Read();
  Add(phases, batch.phases);
  Add(phases, batch.part_phases);
  std::vector<HeadReport>& report = flight.call.report;
  if (flight.part.attend.queries.first == 0) {  // else the head has its report
    batch.part_report.insert(batch.part_report.end(), report.begin(), report.end());
  }
  if (flight.stored != nullptr) batch.stored = std::move(flight.stored);
  if (!flight.ends_layer) return absl::OkStatus();
  // The whole layer, from here on.
  flight.call.args.shape = ShapeOf(batch);
  report = std::exchange(batch.part_report, {});
  if (flight.measured) Observe(flight);
  batch.part_phases = {};
  ++batch.layers_done;
  batch.density += MeanDensity(flight.call.args.shape, report.data());
  PostCommit(flight);
  return absl::OkStatus();
}

void Engine::Observe(const Flight& flight) {
  Batch& batch = *flight.batch;
  const PhaseSeconds& phases = batch.part_phases;
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
  constexpr int kMeasuredEvery = 8;
  return ahead_ == 0 || !Passes(batch.prompts.tokens()) || !batch.layer_phases ||
         batch.parts.size() > 1 || batch.next_layer % kMeasuredEvery == 0 ||
         batch.next_layer + 1 == batch.model->info().layers;
}

// The rest of a prompt runs dense where its layers so far were not worth their selection.
void Engine::Reconsider(Batch& batch) {
  if (!batch.open || batch.layers_done < kLayersToJudge) return;
  const CostModel::Work work = CostModel::WorkOf(ShapeOf(batch));
  if (cost_.SelectingIsFaster(work, batch.density / batch.layers_done)) return;
  batch.policy = DenseInsteadOf(batch.policy);
  batch.dense_reason = DenseReason::kBelowCrossover;
  batch.open = false;
  batch.layer_phases.reset();
}

AttentionShape Engine::ShapeOf(const Batch& batch) const {
  const ModelInfo& info = batch.model->info();
  const std::vector<int64_t>& ends = batch.prompts.cu_seqlens;
  return {info.activations, info.q_heads, info.kv_heads, info.head_dim, ends, ends};
}

// This much attention of the next layer, over what is in the scratch.
StagesCall Engine::PartCall(const Batch& batch, const AttendRange& range) {
  const int d = batch.model->info().head_dim;
  const LayerScratch& rows = batch.scratch->rows;
  StagesCall call;
  call.clock = &layer_clocks_[next_clock_];
  next_clock_ = (next_clock_ + 1) % std::size(layer_clocks_);
  call.dense_reason = batch.dense_reason;
  AttentionArgs& args = call.args;
  args.shape = ShapeOf(batch);
  args.policy = batch.policy;
  args.softmax_scale = 1 / std::sqrt(static_cast<double>(d));
  args.q = {rows.q.data, rows.q.stride, d};
  args.k = {rows.k.data, rows.k.stride, d};
  args.v = {rows.v.data, rows.v.stride, d};
  args.o = {rows.o.data, rows.o.stride, d};
  NarrowTo(range, args);
  if (batch.jobs.size() == 1) args.cancelled = &batch.jobs[0]->cancelled;
  return call;
}

// All of a part, phase by phase.
absl::Status Engine::EnqueuePart(Flight& flight) {
  Batch& batch = *flight.batch;
  const LayerPart& part = flight.part;
  StepClock& clock = *flight.call.clock;
  absl::Status status;
  const bool first = flight.layer == 0 && batch.next_part == 0;
  if (flights_.empty() || first) {  // what began the batch lies between it and a flight
    status = clock.Start();
  } else {
    clock.StartAfter(*flights_.back().call.clock);
  }
  if (!flight.measured) clock.MarkTheEndOnly(*batch.layer_phases);
  if (status.ok() && part.project.count > 0) {
    status = batch.model->ProjectQkv(flight.layer, batch.prompts, batch.scratch->rows, part.project,
                                     kStream);
    if (status.ok()) status = clock.End(Phase::kLinear);
  }
  if (status.ok() && part.store && flight.measured) status = StoreKv(flight);
  if (status.ok() && part.attend.count > 0) status = stages_.Enqueue(flight.call);
  const std::vector<RowRange> rows = RowsToFinish(batch, flight);
  for (size_t i = 0; i < rows.size() && status.ok(); ++i) {
    status = batch.model->FinishLayer(flight.layer, batch.prompts, batch.scratch->rows, rows[i],
                                      kStream);
  }
  // What the part ends with has its mark, unless only the end has one.
  const bool marked = flight.measured && rows.empty();
  if (status.ok() && !marked) status = clock.Finish(Phase::kLinear);
  if (status.ok() && part.store && !flight.measured) status = StoreKv(flight);
  return status;
}

// Of the last layer nothing follows but the logits that were asked for, each of one row.
std::vector<RowRange> Engine::RowsToFinish(const Batch& batch, const Flight& flight) {
  if (flight.part.finish.count > 0) return {flight.part.finish};
  const bool last = flight.layer + 1 == batch.model->info().layers;
  std::vector<RowRange> rows;
  for (size_t s = 0; last && flight.ends_layer && s < batch.jobs.size(); ++s) {
    if (batch.jobs[s]->prefill->return_logits) {
      rows.push_back({batch.prompts.cu_seqlens[s + 1] - 1, 1});
    }
  }
  return rows;
}

void Engine::PostCommit(Flight& flight) {
  Batch& batch = *flight.batch;
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
      std::move(batch.stored),
      [this, ticket = std::move(ticket)](const absl::Status& work) { Commit(ticket, work); });
}

void Engine::Commit(const LayerTicket& ticket, const absl::Status& work) {
  for (size_t s = 0; s < ticket.parts.size(); ++s) {
    const LayerTicket::Part& part = ticket.parts[s];
    Job& job = *part.job;
    PrefillWork& prefill = *job.prefill;
    if (prefill.committed.ok()) prefill.committed = work;  // a layer without the one before is none
    if (prefill.committed.ok()) prefill.committed = prefill.model->CheckFiles();
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

// K and V go to their caches from where the clock stands: in place, or, on a device with memory of
// its own, on the stream of copies, so that nothing is between the layer's kernels. They may still
// be on their way when the layer is computed, and those of the next layer then are behind them.
absl::Status Engine::StoreKv(Flight& flight) {
  Device& device = backend_.device();
  const Stream copies = device.download_stream();
  ActiveScratch& scratch = *flight.batch->scratch;
  absl::Status status = device.Wait(copies, flight.call.clock->end());
  if (status.ok()) status = WriteKv(*flight.batch, flight.layer, copies);
  if (status.ok()) status = Record(copies, scratch.stored[scratch.turn]);
  if (status.ok()) status = Record(copies, flight.stored);
  if (status.ok() && device.host_memory()) status = flight.call.clock->End(Phase::kHandoff);
  return status;
}

absl::Status Engine::Record(Stream stream, std::unique_ptr<Device::Mark>& mark) {
  if (mark == nullptr) {
    auto created = backend_.device().NewMark();
    if (!created.ok()) return created.status();
    mark = *std::move(created);
  }
  return mark->Record(stream);
}

// Rounded to the cache's dtype, to where each job's cache has the layer.
absl::Status Engine::WriteKv(Batch& batch, int layer, Stream stream) {
  const ModelInfo& info = batch.model->info();
  WriteKvArgs args{.k = batch.scratch->rows.k,
                   .v = batch.scratch->rows.v,
                   .kv_heads = info.kv_heads,
                   .head_dim = info.head_dim};
  for (size_t s = 0; s < batch.jobs.size(); ++s) {
    const int64_t begin = batch.prompts.cu_seqlens[s];
    args.parts.push_back({.first = begin,
                          .tokens = batch.prompts.cu_seqlens[s + 1] - begin,
                          .target = batch.jobs[s]->prefill->cache->Target(layer)});
  }
  return (*backend_.ops())->WriteKv(args, stream);
}

}  // namespace prefilld
