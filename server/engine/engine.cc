#include "server/engine/engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/kv/kv_cache.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

constexpr Stream kStream{};
constexpr int64_t kIndexStagingBytes = 8 << 20;

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

// Dense in the place of a sparse method that was left open.
SparsityPolicy DenseInsteadOf(SparsityPolicy policy) {
  policy.method = Method::kDense;
  policy.measure_captured_mass = false;
  policy.min_captured_mass = 0;
  return policy;
}

// Makes a buffer at least so large; what it held is lost. From what allocates: device or host
// memory.
template <typename Allocate>
absl::Status Grow(Buffer& buffer, size_t bytes, Allocate&& allocate) {
  if (buffer.bytes() >= bytes) return absl::OkStatus();
  buffer = Buffer();  // the old one goes first
  auto memory = allocate(bytes);
  if (!memory.ok()) return memory.status();
  buffer = *std::move(memory);
  return absl::OkStatus();
}

// Computed share of all causal blocks of a call.
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

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

Engine::Engine(Backend& backend, Metrics& metrics, int inject_fault_after)
    : backend_(backend), metrics_(metrics), attends_to_fault_(inject_fault_after) {}

absl::Status Engine::Calibrate() {
  absl::Status status = CalibrateAttention();
  // Models run where their linear layers do.
  if (status.ok() && backend_.device().host_memory()) status = CalibrateLinear();
  return status;
}

// Dense attention and selection over random sequences: long enough to reach the kernels' rate,
// short enough not to be noticed at start-up. A GPU's rate depends on the length, so it is asked at
// several.
absl::Status Engine::CalibrateAttention() {
  Device& device = backend_.device();
  const bool host = device.host_memory();
  const DType dtype = host ? DType::kF32 : DType::kBF16;
  const int q_heads = host ? 4 : 32, kv_heads = host ? 4 : 8, head_dim = host ? 64 : 128;
  const std::vector<int64_t> lengths =
      host ? std::vector<int64_t>{1024} : std::vector<int64_t>{256, 1024, 4096, 16384};
  const int rounds = host ? 3 : 7;  // the first warms caches, threads and plans

  // Random bytes of one period, copied until each tensor is full.
  constexpr size_t kPeriod = 1 << 18;  // values
  std::vector<uint32_t> bits(kPeriod);
  uint32_t state = 1;
  for (uint32_t& value : bits) {
    state = state * 1664525u + 1013904223u;
    const float uniform = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    std::memcpy(&value, &uniform, sizeof value);
  }
  std::vector<uint16_t> narrow(kPeriod);
  std::transform(bits.begin(), bits.end(), narrow.begin(),
                 [](uint32_t value) { return static_cast<uint16_t>(value >> 16); });
  const char* period = host ? reinterpret_cast<const char*>(bits.data())
                            : reinterpret_cast<const char*>(narrow.data());
  const size_t period_bytes = kPeriod * SizeOf(dtype);
  const size_t q_bytes = static_cast<size_t>(lengths.back()) * q_heads * head_dim * SizeOf(dtype);
  Buffer q, k, v, o;
  for (Buffer* buffer : {&q, &k, &v, &o}) {
    const size_t bytes = buffer == &k || buffer == &v ? q_bytes / q_heads * kv_heads : q_bytes;
    auto memory = device.Allocate(bytes);
    if (!memory.ok()) return memory.status();
    *buffer = *std::move(memory);
    for (size_t at = 0; at < bytes && buffer != &o; at += period_bytes) {
      absl::Status status =
          device.Copy(buffer->as<char>() + at, period, std::min(period_bytes, bytes - at), kStream);
      if (!status.ok()) return status;
    }
  }

  std::vector<CostCurve::Point> dense, sparse, select;
  for (const int64_t tokens : lengths) {
    std::vector<double> dense_seconds, sparse_seconds, select_seconds;
    const CostModel::Work work = CostModel::WorkOf(q_heads, head_dim, tokens, tokens);
    double density = 1;
    for (int round = 0; round < 2 * rounds; ++round) {
      StagesCall call;
      call.args.shape = {dtype, q_heads, kv_heads, head_dim, {0, tokens}, {0, tokens}};
      call.args.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
      call.args.q = {q.data(), int64_t{q_heads} * head_dim, head_dim};
      call.args.k = {k.data(), int64_t{kv_heads} * head_dim, head_dim};
      call.args.v = {v.data(), int64_t{kv_heads} * head_dim, head_dim};
      call.args.o = {o.data(), int64_t{q_heads} * head_dim, head_dim};
      if (round % 2 == 0) call.args.policy = DenseInsteadOf(call.args.policy);
      if (absl::Status status = RunStages(call); !status.ok()) return status;
      if (round < 2) continue;
      const double selecting = Of(call.phases, Phase::kEstimate) + Of(call.phases, Phase::kSelect);
      const double attending = Of(call.phases, Phase::kAttention);
      if (round % 2 == 0) {
        dense_seconds.push_back(Of(call.phases, Phase::kSelect) + attending);
      } else {
        select_seconds.push_back(selecting);
        sparse_seconds.push_back(attending);
        density = MeanDensity(call.args.shape, call.report.data());
      }
    }
    dense.push_back({work.dense, Median(dense_seconds)});
    sparse.push_back({work.dense * density, Median(sparse_seconds)});
    select.push_back({work.select, Median(select_seconds)});
  }
  cost_.SetCurves(std::move(dense), std::move(sparse), std::move(select));
  return absl::OkStatus();
}

absl::Status Engine::CalibrateLinear() {
  constexpr int kLinear = 512;
  std::vector<float> x(kLinear * kLinear, 0.5f), weight(x), y(x.size());
  auto linear = backend_.ops().PrepareLinear(weight.data(), nullptr, DType::kF32, kLinear, kLinear);
  if (!linear.ok()) return linear.status();
  for (int round = 0; round < 3; ++round) {
    double seconds = 0;
    absl::Status status = Timed(backend_.device(), seconds, [&] {
      return backend_.ops().Apply({.linear = linear->get(),
                                   .x = x.data(),
                                   .x_stride = kLinear,
                                   .y = y.data(),
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

absl::Status Engine::RunStages(StagesCall& call) {
  AttentionArgs& args = call.args;
  Device& device = backend_.device();
  const auto sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  args.index.rows = TotalRows(sequences);
  args.index.stride = MaxKeyBlocks(sequences);
  const size_t rows = static_cast<size_t>(args.shape.q_heads) * args.index.rows;
  const size_t heads = static_cast<size_t>(args.shape.q_heads) * sequences.size();
  const auto on_device = [&](size_t bytes) { return device.Allocate(bytes); };
  const auto on_host = [&](size_t bytes) { return device.AllocateHost(bytes); };
  absl::Status status = Grow(index_count_, rows * sizeof(int32_t), on_device);
  if (status.ok()) status = Grow(index_, rows * args.index.stride * sizeof(uint16_t), on_device);
  if (status.ok()) status = Grow(report_, heads * sizeof(HeadReport), on_host);
  if (!status.ok()) return status;
  args.index.count = index_count_.as<int32_t>();
  args.index.index = index_.as<uint16_t>();
  args.report = report_.as<HeadReport>();

  const CostModel::Work work = CostModel::WorkOf(args.shape);
  status = Enqueue(call, work);
  // Also what failed half way has work on the device, in memory that the caller may give back.
  const absl::Status done = device.Synchronize(kStream);
  if (status.ok()) status = done;
  if (status.ok() && args.cancelled != nullptr && *args.cancelled) {
    status = absl::CancelledError("cancelled");
  }
  if (!status.ok()) return status;
  call.report.assign(args.report, args.report + heads);
  if (call.dense_reason != DenseReason::kNone) {
    for (HeadReport& entry : call.report) entry.dense_reason = call.dense_reason;
  }
  constexpr Phase kPhases[] = {Phase::kEstimate, Phase::kSelect, Phase::kAttention,
                               Phase::kHandoff};
  for (int i = 0; i < 4; ++i) Of(call.phases, kPhases[i]) += device.Seconds(i, i + 1);
  return absl::OkStatus();
}

// All of a call, with a mark between phases.
absl::Status Engine::Enqueue(StagesCall& call, const CostModel::Work& work) {
  AttentionArgs& args = call.args;
  Device& device = backend_.device();
  absl::Status status = device.Mark(0, kStream);
  if (status.ok()) status = backend_.EstimatePattern(args, kStream);
  if (status.ok()) status = device.Mark(1, kStream);
  if (status.ok()) status = backend_.SelectBlocks(args, kStream);
  if (call.open && args.policy.method != Method::kDense) {
    // What was kept is known now: where that is too much, only the selection was in vain.
    if (status.ok()) status = device.Synchronize(kStream);
    if (!status.ok()) return status;
    const double density = MeanDensity(args.shape, args.report);
    if (args.policy.method == Method::kJoint) cost_.ObserveDensity(work.k_blocks, density);
    if (!cost_.SparseIsFaster(work, density)) {
      args.policy = DenseInsteadOf(args.policy);
      call.dense_reason = DenseReason::kBelowCrossover;
      status = backend_.EstimatePattern(args, kStream);
      if (status.ok()) status = backend_.SelectBlocks(args, kStream);
    }
  }
  if (status.ok() && Measures(args.policy)) status = backend_.MeasureCapturedMass(args, kStream);
  if (status.ok()) status = device.Mark(2, kStream);
  if (status.ok()) status = backend_.Attend(args, kStream);
  if (status.ok()) status = device.Mark(3, kStream);
  if (status.ok() && call.host_o != nullptr) {
    status = device.Copy(call.host_o, args.o.data, call.o_bytes, kStream);
  }
  if (status.ok() && call.host_lse != nullptr) {
    status = device.Copy(call.host_lse, args.lse, call.lse_bytes, kStream);
  }
  if (status.ok()) status = device.Mark(4, kStream);
  return status;
}

// What one call teaches the cost model.
void Engine::Observe(const StagesCall& call) {
  const AttentionShape& shape = call.args.shape;
  const CostModel::Work work = CostModel::WorkOf(shape);
  const double estimate = call.phases[static_cast<size_t>(Phase::kEstimate)];
  const double select = call.phases[static_cast<size_t>(Phase::kSelect)];
  const double attention = call.phases[static_cast<size_t>(Phase::kAttention)];
  if (call.args.policy.method != Method::kDense) {
    // What is open becomes joint or dense: the others' selection says nothing about that.
    if (call.args.policy.method == Method::kJoint) cost_.ObserveSelect(work, estimate + select);
    cost_.ObserveSparse(work, MeanDensity(shape, call.report.data()), attention);
  } else if (!call.open) {  // else the time is that of both
    // Without the estimate, which of dense is the making of a plan, once a shape.
    cost_.ObserveDense(work, select + attention);
  }
}

// What one head adds to the metrics.
void Engine::Observe(const std::string& model, const HeadReport& head, bool measured) {
  metrics_.HeadDensity(model, head.pattern, head.density);
  if (measured) metrics_.CapturedMass(model, head.captured_mass);
  if (head.dense_reason != DenseReason::kNone) metrics_.DenseFallback(head.dense_reason);
}

// Dense instead of an unspecified method where selecting would cost more than it saves.
SparsityPolicy Engine::Decide(const Job& job, const AttentionShape& shape, DenseReason* reason) {
  *reason = DenseReason::kNone;
  if (!job.method_unspecified) return job.policy;
  const CostModel::Work work = CostModel::WorkOf(shape);
  if (cost_.SparseIsFaster(work) || cost_.WorthATry(work)) return job.policy;
  *reason = DenseReason::kBelowCrossover;
  return DenseInsteadOf(job.policy);
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

double Engine::PredictSeconds(const Job& job, int layers_done) const {
  const bool dense = job.policy.method == Method::kDense;
  const auto attention = [&](const CostModel::Work& work) {
    if (dense) return cost_.DenseSeconds(work);
    const double sparse = cost_.SelectSeconds(work) +
                          cost_.SparseSeconds(work, cost_.PredictedDensity(work.k_blocks));
    return job.method_unspecified ? std::min(sparse, cost_.DenseSeconds(work)) : sparse;
  };
  if (!job.prefill) return attention(CostModel::WorkOf(job.attend->shape));
  const ModelInfo& info = job.prefill->model->info();
  const int64_t tokens = job.tokens();
  return (info.layers - layers_done) *
         (attention(CostModel::WorkOf(info.q_heads, info.head_dim, tokens, tokens)) +
          cost_.LinearSeconds(tokens, info.layer_weights));
}

absl::Status Engine::EnsureScratch(const ModelInfo& info, int64_t tokens) {
  absl::Status status = Grow(scratch_, static_cast<size_t>(LayerScratchBytes(info, tokens)),
                             [&](size_t bytes) { return backend_.device().Allocate(bytes); });
  if (!status.ok()) return status;
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
  StagesCall call;
  call.dense_reason = batch.dense_reason;
  AttentionArgs& args = call.args;
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
  if (batch.jobs.size() == 1) args.cancelled = &batch.jobs[0]->cancelled;
  status = RunStages(call);
  if (!status.ok()) return status;
  Observe(call);
  for (size_t phase = 0; phase < phases.size(); ++phase) phases[phase] += call.phases[phase];

  status = Timed(device, Of(phases, Phase::kLinear),
                 [&] { return model.FinishLayer(layer, batch.prompts, layer_, kStream); });
  if (!status.ok()) return status;
  cost_.ObserveLinear(tokens, info.layer_weights, Of(phases, Phase::kLinear));

  for (size_t s = 0; s < batch.jobs.size(); ++s) {
    Job& job = *batch.jobs[s];
    const HeadReport* entries = call.report.data() + s * heads;
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
  NoteFault();  // an RPC thread may have met it first
  absl::Status status = CheckDevice();
  if (!status.ok()) return status;
  if (attends_to_fault_ > 0 && --attends_to_fault_ == 0) {
    status = backend_.InjectFault(kStream);
    if (!status.ok()) return status;
  }
  AttendWork& work = *job.attend;
  const AttentionShape& shape = work.shape;
  const int heads = shape.q_heads;
  StagesCall call;
  AttentionArgs& args = call.args;
  args.policy = Decide(job, shape, &call.dense_reason);
  call.open = job.method_unspecified && args.policy.method != Method::kDense;
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
  Device& device = backend_.device();
  constexpr int kUploading = 5;
  status = device.Mark(kUploading, kStream);
  if (status.ok()) status = device.Wait(kStream, device.upload_stream());
  if (status.ok()) status = RunStages(call);
  NoteFault();
  if (!status.ok()) return status;
  Of(call.phases, Phase::kUpload) += device.Seconds(kUploading, 0);
  Observe(call);

  const absl::Time begin = absl::Now();
  if (work.return_block_index) status = CopyIndex(args.index, heads, work);
  if (!status.ok()) return status;
  Of(call.phases, Phase::kHandoff) += absl::ToDoubleSeconds(absl::Now() - begin);
  for (size_t phase = 0; phase < job.phases.size(); ++phase) {
    job.phases[phase] += call.phases[phase];
  }
  job.report = {.layers = shape.sequences(),
                .heads = heads,
                .entries = std::move(call.report),
                .captured_mass_measured = Measures(args.policy)};
  for (const HeadReport& entry : job.report.entries) {
    Observe(kAttendModel, entry, job.report.captured_mass_measured);
  }
  return absl::OkStatus();
}

// The rows in use, as wide as the longest one, -1 behind each row's blocks. A long prompt's index
// is larger than its tensors, so it passes through a staging buffer some rows at a time.
absl::Status Engine::CopyIndex(const BlockIndexView& index, int heads, AttendWork& work) {
  Device& device = backend_.device();
  const int64_t rows = heads * index.rows;
  const int64_t row_bytes = index.stride * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t rows_at_once = std::clamp<int64_t>(kIndexStagingBytes / row_bytes, 1, rows);
  absl::Status status =
      Grow(index_staging_,
           static_cast<size_t>(std::max(rows_at_once * row_bytes, int64_t{kIndexStagingBytes})),
           [&](size_t bytes) { return device.AllocateHost(bytes); });
  if (!status.ok()) return status;
  work.rows = index.rows;
  work.block_count.resize(static_cast<size_t>(rows));
  status = device.Copy(work.block_count.data(), index.count,
                       static_cast<size_t>(rows) * sizeof(int32_t), kStream);
  if (status.ok()) status = device.Synchronize(kStream);
  if (!status.ok()) return status;
  work.max_blocks = *std::max_element(work.block_count.begin(), work.block_count.end());
  work.block_index.assign(static_cast<size_t>(rows * work.max_blocks), -1);
  for (int64_t begin = 0; begin < rows; begin += rows_at_once) {
    const int64_t count = std::min(rows_at_once, rows - begin);
    status = device.Copy(index_staging_.data(), index.index + begin * index.stride,
                         static_cast<size_t>(count * row_bytes), kStream);
    if (status.ok()) status = device.Synchronize(kStream);
    if (!status.ok()) return status;
    for (int64_t row = 0; row < count; ++row) {
      std::copy_n(index_staging_.as<uint16_t>() + row * index.stride, work.block_count[begin + row],
                  work.block_index.begin() + (begin + row) * work.max_blocks);
    }
  }
  return absl::OkStatus();
}

}  // namespace prefilld
