#include "server/engine/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace prefilld {
namespace {

constexpr Stream kStream{};

// What is timed: long enough to reach the kernels' rate, short enough not to be noticed at
// start-up. A GPU's rate depends on the length, so it is asked at several.
struct Trial {
  DType dtype;
  int q_heads, kv_heads, head_dim;
  std::vector<int64_t> lengths;
  int rounds;  // the first warms caches, threads and plans
};
const Trial kHostTrial = {DType::kF32, 4, 4, 64, {1024}, 6};
const Trial kDeviceTrial = {DType::kBF16, 32, 8, 128, {256, 1024, 4096, 16384}, 7};
const Trial kDeviceF32Trial = {DType::kF32, 32, 8, 128, {2048}, 2};

struct Tensors {
  Buffer q, k, v, o;
};

// One point of each curve.
struct Points {
  CostCurve::Point dense, sparse, select;
};

// Uniform in [-1, 1), of a dtype that is as wide as F32 or its upper half.
std::vector<char> RandomValues(size_t count, DType dtype) {
  const size_t bytes = SizeOf(dtype);
  std::vector<char> values(count * bytes);
  uint32_t state = 1;
  for (size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const float uniform = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &uniform, sizeof bits);
    bits >>= 8 * (sizeof bits - bytes);
    std::memcpy(values.data() + i * bytes, &bits, bytes);
  }
  return values;
}

// Random q, k and v of the longest length.
absl::StatusOr<Tensors> MakeTensors(Device& device, const Trial& trial) {
  const std::vector<char> period = RandomValues(1 << 18, trial.dtype);  // copied until all is full
  const size_t head_bytes =
      static_cast<size_t>(trial.lengths.back()) * trial.head_dim * SizeOf(trial.dtype);
  Tensors tensors;
  for (auto [buffer, heads] :
       {std::pair(&tensors.q, trial.q_heads), std::pair(&tensors.k, trial.kv_heads),
        std::pair(&tensors.v, trial.kv_heads), std::pair(&tensors.o, trial.q_heads)}) {
    const size_t bytes = head_bytes * heads;
    auto memory = device.Allocate(bytes);
    if (!memory.ok()) return memory.status();
    *buffer = *std::move(memory);
    if (buffer == &tensors.o) continue;
    for (size_t at = 0; at < bytes; at += period.size()) {
      const size_t part = std::min(period.size(), bytes - at);
      absl::Status status = device.Copy(buffer->as<char>() + at, period.data(), part, kStream);
      if (!status.ok()) return status;
    }
  }
  return tensors;
}

StagesCall CallOf(const Trial& trial, const Tensors& tensors, int64_t tokens) {
  const int64_t q_stride = int64_t{trial.q_heads} * trial.head_dim;
  const int64_t kv_stride = int64_t{trial.kv_heads} * trial.head_dim;
  StagesCall call;
  call.args.shape = {trial.dtype,    trial.q_heads, trial.kv_heads,
                     trial.head_dim, {0, tokens},   {0, tokens}};
  call.args.softmax_scale = 1 / std::sqrt(static_cast<double>(trial.head_dim));
  call.args.q = {tensors.q.data(), q_stride, trial.head_dim};
  call.args.k = {tensors.k.data(), kv_stride, trial.head_dim};
  call.args.v = {tensors.v.data(), kv_stride, trial.head_dim};
  call.args.o = {tensors.o.data(), q_stride, trial.head_dim};
  return call;
}

// One call: what its phases took, and the density that it found.
struct Timed {
  PhaseSeconds phases{};
  double density = 1;
};
absl::StatusOr<Timed> TimeCall(Stages& stages, StepClock& clock, StagesCall call) {
  call.clock = &clock;
  absl::Status status = stages.Prepare(call);
  if (status.ok()) status = clock.Start();
  if (status.ok()) status = clock.Await(stages.Enqueue(call));
  if (status.ok()) status = stages.Collect(call);
  if (!status.ok()) return status;
  return Timed{.phases = clock.Read(), .density = MeanDensity(call.args.shape, call.report.data())};
}

StagesCall DenseCallOf(const Trial& trial, const Tensors& tensors, int64_t tokens) {
  StagesCall call = CallOf(trial, tensors, tokens);
  call.args.policy = DenseInsteadOf(call.args.policy);
  return call;
}

// Dense and the default method in turn, the best of each: what is slower was disturbed.
absl::StatusOr<Points> TimeLength(Stages& stages, StepClock& clock, const Trial& trial,
                                  const Tensors& tensors, int64_t tokens) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  double dense_seconds = kNone, sparse_seconds = kNone, select_seconds = kNone, density = 1;
  for (int round = 0; round < trial.rounds; ++round) {
    auto dense = TimeCall(stages, clock, DenseCallOf(trial, tensors, tokens));
    if (!dense.ok()) return dense.status();
    auto sparse = TimeCall(stages, clock, CallOf(trial, tensors, tokens));
    if (!sparse.ok()) return sparse.status();
    if (round == 0) continue;
    dense_seconds = std::min(dense_seconds, Of(dense->phases, Phase::kAttention));
    sparse_seconds = std::min(sparse_seconds, Of(sparse->phases, Phase::kAttention));
    select_seconds = std::min(
        select_seconds, Of(sparse->phases, Phase::kEstimate) + Of(sparse->phases, Phase::kSelect));
    density = sparse->density;
  }
  const CostModel::Work work = CostModel::WorkOf(trial.q_heads, trial.head_dim, tokens, tokens);
  return Points{.dense = {work.dense, dense_seconds},
                .sparse = {work.dense * density, sparse_seconds},
                .select = {work.select, select_seconds}};
}

// Dense attention and selection over random sequences, of each length of the trial.
absl::StatusOr<std::vector<Points>> TimeAttention(Device& device, Stages& stages, StepClock& clock,
                                                  const Trial& trial) {
  auto tensors = MakeTensors(device, trial);
  if (!tensors.ok()) return tensors.status();
  std::vector<Points> all;
  for (const int64_t tokens : trial.lengths) {
    auto points = TimeLength(stages, clock, trial, *tensors, tokens);
    if (!points.ok()) return points.status();
    all.push_back(*points);
  }
  return all;
}

absl::Status CalibrateAttention(Device& device, Stages& stages, StepClock& clock, CostModel& cost) {
  const auto points =
      TimeAttention(device, stages, clock, device.host_memory() ? kHostTrial : kDeviceTrial);
  if (!points.ok()) return points.status();
  std::vector<CostCurve::Point> dense, sparse, select;
  for (const Points& point : *points) {
    dense.push_back(point.dense);
    sparse.push_back(point.sparse);
    select.push_back(point.select);
  }
  cost.SetCurves(std::move(dense), std::move(sparse), std::move(select));
  return absl::OkStatus();
}

// A square product of `width` tokens.
struct LinearTrial {
  DType dtype;
  int width;
};
const LinearTrial kHostLinear = {DType::kF32, 512};
const LinearTrial kDeviceLinear = {DType::kBF16, 4096};

// The best of a few.
absl::StatusOr<CostCurve::Point> TimeLinear(Backend& backend, StepClock& clock) {
  Device& device = backend.device();
  auto found = backend.ops();
  if (!found.ok()) return found.status();
  Ops& ops = **found;
  const auto [dtype, width] = device.host_memory() ? kHostLinear : kDeviceLinear;
  const std::vector<char> weight = RandomValues(static_cast<size_t>(width) * width, dtype);
  auto linear =
      ops.Prepare(LinearWeights{.parts = {{.weight = weight.data(), .out_features = width}},
                                .dtype = dtype,
                                .in_features = width});
  if (!linear.ok()) return linear.status();
  const DType rows = ops.activations(dtype);
  auto memory = device.Allocate(2 * static_cast<size_t>(width) * width * SizeOf(rows));
  if (!memory.ok()) return memory.status();
  const Rows x = {memory->data(), rows, width};
  const double flops = 2.0 * width * width * width;
  CostCurve::Point best{flops, std::numeric_limits<double>::infinity()};
  for (int round = 0; round < 5; ++round) {
    absl::Status status = clock.Start();
    if (status.ok()) {
      status = ops.AddProduct(
          {.linear = linear->get(), .x = x, .residual = x.From(width), .tokens = width}, kStream);
    }
    if (status.ok()) status = clock.End(Phase::kLinear);
    if (status = clock.Await(status); !status.ok()) return status;
    best.seconds = std::min(best.seconds, Of(clock.Read(), Phase::kLinear));
  }
  return best;
}

absl::Status CalibrateLinear(Backend& backend, StepClock& clock, CostModel& cost) {
  const auto best = TimeLinear(backend, clock);
  if (!best.ok()) return best.status();
  cost.SetLinear(*best);
  return absl::OkStatus();
}

// F32 has no tensor cores: its kernels, and its products likewise, take many times as long as the
// curve of dense says, by the last round.
absl::Status CalibrateF32(Device& device, Stages& stages, StepClock& clock, CostModel& cost) {
  const Trial& trial = kDeviceF32Trial;
  auto tensors = MakeTensors(device, trial);
  if (!tensors.ok()) return tensors.status();
  const int64_t tokens = trial.lengths[0];
  double seconds = 0;
  for (int round = 0; round < trial.rounds; ++round) {
    auto dense = TimeCall(stages, clock, DenseCallOf(trial, *tensors, tokens));
    if (!dense.ok()) return dense.status();
    seconds = Of(dense->phases, Phase::kAttention);
  }
  const CostModel::Work work = CostModel::WorkOf(trial.q_heads, trial.head_dim, tokens, tokens);
  cost.SetSlowness(DType::kF32, std::max(1.0, seconds / cost.DenseSeconds(work)));
  return absl::OkStatus();
}

}  // namespace

absl::Status Calibrate(const Calibrated& of, CostModel& cost) {
  Device& device = of.backend.device();
  absl::Status status = CalibrateAttention(device, of.stages, of.clock, cost);
  if (status.ok() && !device.host_memory()) {
    status = CalibrateF32(device, of.stages, of.clock, cost);
  }
  if (status.ok() && of.models) status = CalibrateLinear(of.backend, of.clock, cost);
  return status;
}

absl::Status Recalibrate(const Calibrated& of, CostModel& cost) {
  Trial trial = kHostTrial;
  trial.rounds = 3;
  const auto points = TimeAttention(of.backend.device(), of.stages, of.clock, trial);
  if (!points.ok()) return points.status();
  for (const Points& point : *points) cost.NotSlowerThan(point.dense, point.sparse, point.select);
  if (!of.models) return absl::OkStatus();
  const auto linear = TimeLinear(of.backend, of.clock);
  if (!linear.ok()) return linear.status();
  cost.LinearNotSlowerThan(*linear);
  return absl::OkStatus();
}

}  // namespace prefilld
