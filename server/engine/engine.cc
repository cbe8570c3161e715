#include "server/engine/engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "server/kv/kv_cache.h"

namespace prefilld {
namespace {

constexpr Stream kStream{};

// Runs `work`, waits for the device and adds the seconds to a phase.
template <typename Work>
absl::Status Timed(Device& device, double& phase, Work&& work) {
  const absl::Time begin = absl::Now();
  absl::Status status = work();
  if (status.ok()) status = device.Synchronize(kStream);
  phase += absl::ToDoubleSeconds(absl::Now() - begin);
  return status;
}

double& Of(PhaseSeconds& phases, Phase phase) { return phases[static_cast<size_t>(phase)]; }

bool Measures(const SparsityPolicy& policy) {
  return policy.measure_captured_mass || policy.min_captured_mass > 0;
}

}  // namespace

Engine::Engine(Backend& backend, Metrics& metrics) : backend_(backend), metrics_(metrics) {}

// Dense attention and selection over a short random sequence: long enough to reach the kernels'
// rate, short enough not to be noticed at start-up.
absl::Status Engine::Calibrate() {
  constexpr int kTokens = 1024, kHeads = 4, kDim = 64, kLinear = 512;
  std::vector<float> q(kTokens * kHeads * kDim), k(q.size()), o(q.size());
  uint32_t state = 1;
  for (size_t i = 0; i < q.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    q[i] = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    k[q.size() - 1 - i] = q[i];
  }
  std::vector<HeadReport> report(kHeads);
  AttentionArgs args;
  args.shape = {DType::kF32, kHeads, kHeads, kDim, {0, kTokens}, {0, kTokens}};
  args.softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
  args.q = {q.data(), kHeads * kDim, kDim};
  args.k = args.v = {k.data(), kHeads * kDim, kDim};
  args.o = {o.data(), kHeads * kDim, kDim};
  args.report = report.data();
  for (int round = 0; round < 6; ++round) {  // the first rounds warm caches and threads
    PhaseSeconds phases{};
    args.policy.method = round % 2 == 0 ? Method::kDense : Method::kJoint;
    args.policy.measure_captured_mass = args.policy.method == Method::kJoint;
    if (absl::Status status = RunStages(args, phases, DenseReason::kNone); !status.ok())
      return status;
    if (round < 2) continue;
    for (int follow = 0; follow < 10; ++follow) Observe(args, phases);
  }
  auto linear = backend_.ops().PrepareLinear(k.data(), nullptr, DType::kF32, kLinear, kLinear);
  if (!linear.ok()) return linear.status();
  for (int round = 0; round < 3; ++round) {
    double seconds = 0;
    absl::Status status = Timed(backend_.device(), seconds, [&] {
      return backend_.ops().Apply({.linear = linear->get(),
                                   .x = q.data(),
                                   .x_stride = kLinear,
                                   .y = o.data(),
                                   .y_stride = kLinear,
                                   .tokens = kLinear},
                                  kStream);
    });
    if (!status.ok()) return status;
    for (int follow = 0; follow < 10 * round; ++follow) {
      cost_.ObserveLinear(kLinear, int64_t{kLinear} * kLinear, seconds);
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::RunStages(AttentionArgs& args, PhaseSeconds& phases,
                               DenseReason dense_reason) {
  const auto sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  args.index.rows = TotalRows(sequences);
  args.index.stride = MaxKeyBlocks(sequences);
  const size_t rows = static_cast<size_t>(args.shape.q_heads) * args.index.rows;
  if (index_count_.size() < rows) index_count_.resize(rows);
  if (index_.size() < rows * args.index.stride) index_.resize(rows * args.index.stride);
  args.index.count = index_count_.data();
  args.index.index = index_.data();

  Device& device = backend_.device();
  absl::Status status = Timed(device, Of(phases, Phase::kEstimate),
                              [&] { return backend_.EstimatePattern(args, kStream); });
  if (!status.ok()) return status;
  status = Timed(device, Of(phases, Phase::kSelect), [&] {
    absl::Status selected = backend_.SelectBlocks(args, kStream);
    return selected.ok() && Measures(args.policy) ? backend_.MeasureCapturedMass(args, kStream)
                                                  : selected;
  });
  if (!status.ok()) return status;
  if (dense_reason != DenseReason::kNone) {
    const int heads = args.shape.sequences() * args.shape.q_heads;
    for (int i = 0; i < heads; ++i) args.report[i].dense_reason = dense_reason;
  }
  status =
      Timed(device, Of(phases, Phase::kAttention), [&] { return backend_.Attend(args, kStream); });
  if (status.ok() && args.cancelled != nullptr && *args.cancelled) {
    return absl::CancelledError("cancelled");
  }
  return status;
}

// What one call teaches the cost model.
void Engine::Observe(const AttentionArgs& args, const PhaseSeconds& phases) {
  if (args.shape.sequences() != 1) return;  // ragged batches would need the sum over sequences
  const AttentionShape& shape = args.shape;
  const int64_t sq = shape.total_q(), sk = shape.total_k();
  double density = 0;
  for (int h = 0; h < shape.q_heads; ++h) density += args.report[h].density / shape.q_heads;
  cost_.ObserveAttention(shape.q_heads, shape.head_dim, sq, sk, density,
                         phases[static_cast<size_t>(Phase::kAttention)]);
  if (args.policy.method == Method::kDense) return;
  cost_.ObserveSelect(
      shape.q_heads, shape.head_dim, sk,
      phases[static_cast<size_t>(Phase::kEstimate)] + phases[static_cast<size_t>(Phase::kSelect)]);
}

// What one head adds to the metrics.
void Engine::Observe(const std::string& model, const HeadReport& head, bool measured) {
  metrics_.HeadDensity(model, head.pattern, head.density);
  if (measured) metrics_.CapturedMass(model, head.captured_mass);
  if (head.dense_reason != DenseReason::kNone) metrics_.DenseFallback(head.dense_reason);
}

// Dense instead of an unspecified method where selecting would cost more than it saves.
SparsityPolicy Engine::Decide(const Job& job, const AttentionShape& shape,
                              DenseReason* reason) const {
  SparsityPolicy policy = job.policy;
  *reason = DenseReason::kNone;
  if (!job.method_unspecified) return policy;
  int64_t longest_q = 0, longest_k = 0;
  for (int s = 0; s < shape.sequences(); ++s) {
    longest_q = std::max(longest_q, shape.cu_seqlens_q[s + 1] - shape.cu_seqlens_q[s]);
    longest_k = std::max(longest_k, shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s]);
  }
  if (!cost_.SparseIsFaster(shape.q_heads, shape.head_dim, longest_q, longest_k)) {
    policy.method = Method::kDense;
    policy.measure_captured_mass = false;
    policy.min_captured_mass = 0;
    *reason = DenseReason::kBelowCrossover;
  }
  return policy;
}

double Engine::PredictSeconds(const Job& job, int layers_done) const {
  const bool dense = job.policy.method == Method::kDense;
  const auto attention = [&](int heads, int dim, int64_t sq, int64_t sk) {
    const double density = dense ? 1 : cost_.PredictedDensity((sk + 127) / 128);
    return cost_.AttentionSeconds(heads, dim, sq, sk, density) +
           (dense ? 0 : cost_.SelectSeconds(heads, dim, sk));
  };
  if (job.prefill) {
    const ModelInfo& info = job.prefill->model->info();
    const int64_t tokens = job.tokens();
    return (info.layers - layers_done) * (attention(info.q_heads, info.head_dim, tokens, tokens) +
                                          cost_.LinearSeconds(tokens, info.layer_weights));
  }
  const AttentionShape& shape = job.attend->shape;
  double seconds = 0;
  for (int s = 0; s < shape.sequences(); ++s) {
    seconds +=
        attention(shape.q_heads, shape.head_dim, shape.cu_seqlens_q[s + 1] - shape.cu_seqlens_q[s],
                  shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s]);
  }
  return seconds;
}

absl::Status Engine::EnsureScratch(const ModelInfo& info, int64_t tokens) {
  const size_t bytes = static_cast<size_t>(LayerScratchBytes(info, tokens));
  if (scratch_.bytes() < bytes) {
    scratch_ = Buffer();  // the old one goes first
    auto scratch = backend_.device().Allocate(bytes);
    if (!scratch.ok()) return scratch.status();
    scratch_ = *std::move(scratch);
  }
  layer_ = SplitLayerScratch(info, tokens, scratch_.data());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Batch>> Engine::Begin(std::vector<std::shared_ptr<Job>> jobs) {
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
  AttentionShape shape{DType::kF32,
                       info.q_heads,
                       info.kv_heads,
                       info.head_dim,
                       batch->prompts.cu_seqlens,
                       batch->prompts.cu_seqlens};
  batch->policy = Decide(*batch->jobs[0], shape, &batch->dense_reason);
  for (const auto& job : batch->jobs) {
    job->report.layers = info.layers;
    job->report.heads = info.q_heads;
    job->report.entries.resize(static_cast<size_t>(info.layers) * info.q_heads);
    job->report.captured_mass_measured = Measures(batch->policy);
  }
  absl::Status status = Timed(backend_.device(), Of(batch->phases, Phase::kLinear),
                              [&] { return batch->model->Begin(batch->prompts, kStream); });
  if (!status.ok()) return status;
  return batch;
}

absl::Status Engine::RunLayer(Batch& batch) {
  Transformer& model = *batch.model;
  const ModelInfo& info = model.info();
  const int layer = batch.next_layer;
  const int64_t tokens = batch.prompts.tokens();
  if (absl::Status status = EnsureScratch(info, tokens); !status.ok()) return status;
  Device& device = backend_.device();
  PhaseSeconds phases{};

  absl::Status status = Timed(device, Of(phases, Phase::kLinear), [&] {
    return model.ProjectQkv(layer, batch.prompts, layer_, kStream);
  });
  if (!status.ok()) return status;

  status = Timed(device, Of(phases, Phase::kHandoff), [&] { return StoreKv(batch, layer); });
  if (!status.ok()) return status;

  const int heads = info.q_heads;
  std::vector<HeadReport> report(batch.jobs.size() * heads);
  AttentionArgs args;
  args.shape = {DType::kF32,
                heads,
                info.kv_heads,
                info.head_dim,
                batch.prompts.cu_seqlens,
                batch.prompts.cu_seqlens};
  args.policy = batch.policy;
  args.softmax_scale = 1 / std::sqrt(static_cast<double>(info.head_dim));
  args.q = {layer_.q, int64_t{heads} * info.head_dim, info.head_dim};
  args.k = {layer_.k, int64_t{info.kv_heads} * info.head_dim, info.head_dim};
  args.v = {layer_.v, int64_t{info.kv_heads} * info.head_dim, info.head_dim};
  args.o = {layer_.o, int64_t{heads} * info.head_dim, info.head_dim};
  args.report = report.data();
  if (batch.jobs.size() == 1) args.cancelled = &batch.jobs[0]->cancelled;
  status = RunStages(args, phases, batch.dense_reason);
  if (!status.ok()) return status;
  Observe(args, phases);

  status = Timed(device, Of(phases, Phase::kLinear),
                 [&] { return model.FinishLayer(layer, batch.prompts, layer_, kStream); });
  if (!status.ok()) return status;
  cost_.ObserveLinear(tokens, info.layer_weights, Of(phases, Phase::kLinear));

  for (size_t s = 0; s < batch.jobs.size(); ++s) {
    Job& job = *batch.jobs[s];
    const HeadReport* entries = report.data() + s * heads;
    std::copy_n(entries, heads, job.report.entries.begin() + int64_t{layer} * heads);
    const bool measured = job.report.captured_mass_measured;
    double density = 0, captured = 0;
    for (int h = 0; h < heads; ++h) {
      density += entries[h].density / heads;
      captured += entries[h].captured_mass / heads;
      Observe(info.name, entries[h], measured);
    }
    metrics_.LayerDensity(info.name, layer, density);
    if (layer == 0) {
      metrics_.time_to_first_layer.Observe(absl::ToDoubleSeconds(absl::Now() - job.arrival));
    }
    job.prefill->cache->Commit(layer);
    job.sink->OnLayerReady(layer, density, measured ? captured : 0);
    if (batch.policy.method == Method::kJoint) {
      cost_.ObserveDensity((job.tokens() + kKvBlockTokens - 1) / kKvBlockTokens, density);
    }
  }
  for (size_t phase = 0; phase < phases.size(); ++phase) batch.phases[phase] += phases[phase];
  ++batch.next_layer;
  return absl::OkStatus();
}

// Writes the layer's K and V, rounded to the cache's dtype, into each job's blocks.
absl::Status Engine::StoreKv(Batch& batch, int layer) {
  const ModelInfo& info = batch.model->info();
  const int64_t stride = int64_t{info.kv_heads} * info.head_dim;
  for (size_t s = 0; s < batch.jobs.size(); ++s) {
    KvCache& cache = *batch.jobs[s]->prefill->cache;
    const KvGeometry& geometry = cache.geometry();
    const int64_t begin = batch.prompts.cu_seqlens[s];
    for (int64_t b = 0; b < geometry.blocks_per_layer(); ++b) {
      const int64_t first = b * kKvBlockTokens;
      const int64_t rows = std::min<int64_t>(kKvBlockTokens, geometry.tokens - first);
      for (int g = 0; g < info.kv_heads; ++g) {
        for (const bool value : {false, true}) {
          const float* source =
              (value ? layer_.v : layer_.k) + (begin + first) * stride + g * info.head_dim;
          absl::Status status =
              backend_.ops().Convert(source, stride, rows, info.head_dim, geometry.dtype,
                                     cache.ComputeTile(layer, b, g, value), kStream);
          if (!status.ok()) return status;
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::Finish(Batch& batch) {
  absl::Status status = Timed(backend_.device(), Of(batch.phases, Phase::kLinear), [&] {
    for (size_t s = 0; s < batch.jobs.size(); ++s) {
      PrefillWork& work = *batch.jobs[s]->prefill;
      if (!work.return_logits) continue;
      work.logits.resize(batch.model->info().vocab_size);
      absl::Status logits = batch.model->Logits(batch.prompts, batch.prompts.cu_seqlens[s + 1] - 1,
                                                1, work.logits.data(), kStream);
      if (!logits.ok()) return logits;
    }
    return absl::OkStatus();
  });
  for (const auto& job : batch.jobs) TakePhases(batch, *job);
  return status;
}

void Engine::TakePhases(const Batch& batch, Job& job) {
  for (size_t phase = 0; phase < job.phases.size(); ++phase)
    job.phases[phase] += batch.phases[phase];
}

void Engine::Remove(Batch& batch, size_t index) {
  TakePhases(batch, *batch.jobs[index]);
  PrefillBatch& prompts = batch.prompts;
  const int64_t begin = prompts.cu_seqlens[index], end = prompts.cu_seqlens[index + 1];
  const int64_t hidden = batch.model->info().hidden_size;
  float* residual = prompts.residual.as<float>();
  std::memmove(residual + begin * hidden, residual + end * hidden,
               static_cast<size_t>((prompts.tokens() - end) * hidden) * sizeof(float));
  prompts.token_ids.erase(prompts.token_ids.begin() + begin, prompts.token_ids.begin() + end);
  prompts.positions.erase(prompts.positions.begin() + begin, prompts.positions.begin() + end);
  prompts.cu_seqlens.erase(prompts.cu_seqlens.begin() + static_cast<std::ptrdiff_t>(index) + 1);
  for (size_t s = index + 1; s < prompts.cu_seqlens.size(); ++s)
    prompts.cu_seqlens[s] -= end - begin;
  batch.jobs.erase(batch.jobs.begin() + static_cast<std::ptrdiff_t>(index));
}

absl::Status Engine::RunAttend(Job& job) {
  AttendWork& work = *job.attend;
  const AttentionShape& shape = work.shape;
  const int heads = shape.q_heads, sequences = shape.sequences();
  DenseReason dense_reason;
  AttentionArgs args;
  args.policy = Decide(job, shape, &dense_reason);
  args.shape = shape;
  args.softmax_scale = work.softmax_scale;
  args.q = {work.q.data(), int64_t{heads} * shape.head_dim, shape.head_dim};
  args.k = {work.k.data(), int64_t{shape.kv_heads} * shape.head_dim, shape.head_dim};
  args.v = {work.v.data(), int64_t{shape.kv_heads} * shape.head_dim, shape.head_dim};
  args.o = {work.o.data(), int64_t{heads} * shape.head_dim, shape.head_dim};
  if (work.return_lse) {
    work.lse.resize(static_cast<size_t>(heads) * shape.total_q());
    args.lse = work.lse.data();
  }
  job.report.layers = sequences;
  job.report.heads = heads;
  job.report.entries.assign(static_cast<size_t>(sequences) * heads, {});
  job.report.captured_mass_measured = Measures(args.policy);
  args.report = job.report.entries.data();
  args.cancelled = &job.cancelled;
  absl::Status status = RunStages(args, job.phases, dense_reason);
  if (!status.ok()) return status;
  Observe(args, job.phases);

  const absl::Time begin = absl::Now();
  if (work.return_block_index) CopyIndex(args.index, heads, work);
  Of(job.phases, Phase::kHandoff) += absl::ToDoubleSeconds(absl::Now() - begin);
  for (const HeadReport& entry : job.report.entries) {
    Observe(kAttendModel, entry, job.report.captured_mass_measured);
  }
  return absl::OkStatus();
}

// The rows in use, as wide as the longest one, -1 behind each row's blocks.
void Engine::CopyIndex(const BlockIndexView& index, int heads, AttendWork& work) {
  work.rows = index.rows;
  const size_t rows = static_cast<size_t>(heads) * index.rows;
  work.block_count.assign(index.count, index.count + rows);
  work.max_blocks = *std::max_element(work.block_count.begin(), work.block_count.end());
  work.block_index.assign(rows * work.max_blocks, -1);
  for (size_t row = 0; row < rows; ++row) {
    std::copy_n(index.index + row * index.stride, index.count[row],
                work.block_index.begin() + static_cast<std::ptrdiff_t>(row * work.max_blocks));
  }
}

}  // namespace prefilld
