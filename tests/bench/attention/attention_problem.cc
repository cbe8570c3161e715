#include "tests/bench/attention/attention_problem.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>

#include "kernels/cuda/select/flexprefill/flexprefill.h"
#include "kernels/cuda/select/joint/joint.h"
#include "tests/bench/attention/attention_workload.h"

namespace prefilld::bench {
namespace {

using cuda::Sequence;

constexpr int kSampledQueries = 64;
constexpr double kEfficiency = 0.85, kOverheadMs = 1;  // of the bound

}  // namespace

AttentionProblem::AttentionProblem(const Settings& settings, const std::vector<int64_t>& lengths,
                                   cuda::CudaDevice* device, const Clock* clock)
    : settings_(settings),
      device_(*device),
      dense_(*device),
      clock_(*clock),
      stream_(device->stream({})) {
  cuda::Problem& p = problem_;
  p.dtype = settings.dtype;
  p.q_heads = settings.q_heads;
  p.kv_heads = settings.kv_heads;
  p.head_dim = settings.head_dim;
  p.block_size = settings.block_size;
  p.softmax_scale = static_cast<float>(1 / std::sqrt(settings.head_dim));
  p.sequences = static_cast<int>(lengths.size());
  for (int64_t length : lengths) {
    const auto tokens = static_cast<int32_t>(length);
    const int32_t blocks = (tokens + p.block_size - 1) / p.block_size;
    host_sequences_.push_back({.q_begin = static_cast<int32_t>(p.total_q),
                               .k_begin = static_cast<int32_t>(p.total_k),
                               .sq = tokens,
                               .sk = tokens,
                               .prefix = 0,
                               .first_q_block = 0,
                               .q_blocks = blocks,
                               .k_blocks = blocks,
                               .row_begin = static_cast<int32_t>(p.rows),
                               .page_begin = 0});
    p.total_q += length;
    p.total_k += length;
    p.rows += blocks;
    p.sq_max = p.sk_max = std::max(p.sk_max, tokens);
    p.q_blocks_max = p.k_blocks_max = std::max(p.k_blocks_max, blocks);
  }
  p.host_sequence = host_sequences_.data();
  p.sequence = Take<Sequence>(p.sequences);
  CHECK_CUDA(cuda::WriteSequences(p.host_sequence, p.sequences, const_cast<Sequence*>(p.sequence),
                                  stream_));
  const auto tensor = [&](int64_t tokens, int64_t heads) {
    const int64_t bytes = tokens * heads * p.head_dim * static_cast<int64_t>(SizeOf(p.dtype));
    return cuda::Tensor{Take<std::byte>(bytes), heads * p.head_dim, p.head_dim};
  };
  p.q = tensor(p.total_q, p.q_heads);
  p.k = tensor(p.total_k, p.kv_heads);
  p.v = tensor(p.total_k, p.kv_heads);
  p.o = tensor(p.total_q, p.q_heads);
  p.lse = Take<float>(p.q_heads * p.total_q);
  p.index_stride = p.k_blocks_max;
  count_ = std::make_unique<DeviceMemory>(p.q_heads * p.rows * sizeof(int32_t));
  index_ = std::make_unique<DeviceMemory>(p.q_heads * p.rows * p.index_stride * sizeof(uint16_t));
  p.count = count_->as<int32_t>();
  p.index = index_->as<uint16_t>();
  report_ = std::make_unique<DeviceMemory>(p.sequences * p.q_heads * sizeof(HeadReport));
  size_t selection = cuda::CapturedMassWorkspace(p);
  if (Wants(Method::kJoint)) selection = std::max(selection, cuda::JointWorkspace(p));
  if (Wants(Method::kFlexPrefill)) selection = std::max(selection, cuda::FlexPrefillWorkspace(p));
  selection_workspace_ = std::make_unique<DeviceMemory>(selection);
  attend_workspace_ = std::make_unique<DeviceMemory>(cuda::AttendWorkspace(p));

  std::vector<int32_t> queries;
  for (int i = 0; i < kSampledQueries; ++i) {
    queries.push_back(static_cast<int32_t>((2 * i + 1) * p.total_q / (2 * kSampledQueries)));
  }
  queries.back() = static_cast<int32_t>(p.total_q - 1);
  queries_ = std::make_unique<DeviceMemory>(queries.size() * sizeof(int32_t));
  queries_->Set(queries);
}

template <typename T>
T* AttentionProblem::Take(int64_t count) {
  memory_.push_back(std::make_unique<DeviceMemory>(static_cast<size_t>(count) * sizeof(T)));
  return memory_.back()->as<T>();
}

bool AttentionProblem::Wants(Method method) const {
  return std::count(settings_.methods.begin(), settings_.methods.end(), method) > 0;
}

bool AttentionProblem::Runs(const KernelSet& set) const {
  return std::count(settings_.kernels.begin(), settings_.kernels.end(), set.name) > 0 &&
         set.has(problem_.dtype, problem_.head_dim, problem_.block_size);
}

size_t AttentionProblem::WorkspaceBytes() const {
  return count_->bytes() + index_->bytes() +
         std::max(selection_workspace_->bytes(), attend_workspace_->bytes());
}

void AttentionProblem::FillRandom() {
  CHECK_CUDA(bench::FillRandom(problem_, 1, stream_));
  exact_dense_.clear();
}

void AttentionProblem::FillStructured(double strength) {
  CHECK_CUDA(bench::FillStructured(problem_, {.strength = strength}, stream_));
  exact_dense_.clear();
}

void AttentionProblem::FillSaved(const uint8_t* q, const uint8_t* k, const uint8_t* v) {
  const auto copy = [](const cuda::Tensor& to, const uint8_t* from, int64_t tokens) {
    CHECK_CUDA(cudaMemcpy(to.data, from, tokens * to.token_stride * 2, cudaMemcpyHostToDevice));
  };
  copy(problem_.q, q, problem_.total_q);
  copy(problem_.k, k, problem_.total_k);
  copy(problem_.v, v, problem_.total_k);
  exact_dense_.clear();
}

void AttentionProblem::FillForDensity(double density) {
  double low = 0.05, high = 4;  // a stronger structure is sparser
  for (int step = 0; step < 10; ++step) {
    const double middle = std::sqrt(low * high);
    FillStructured(middle);
    EnqueueSelect(Method::kJoint);
    const double got = Density();
    if (std::abs(got - density) < 0.02 * density) return;
    (got > density ? low : high) = middle;
  }
}

// What early rows are over, because they hold two blocks, later ones are under.
void AttentionProblem::SetRandomIndex(double density) {
  std::vector<int32_t> count(problem_.q_heads * problem_.rows);
  std::vector<uint16_t> index(count.size() * problem_.index_stride);
  std::minstd_rand random(7);
  for (int h = 0; h < problem_.q_heads; ++h) {
    double due = 0;
    for (const Sequence& s : host_sequences_) {
      for (int32_t I = 0; I < s.q_blocks; ++I) {
        const int64_t at = h * problem_.rows + s.row_begin + I;
        uint16_t* row = &index[at * problem_.index_stride];
        due += density * (I + 1);
        const int32_t least = std::min(2, I + 1);
        const int32_t keep = std::clamp(static_cast<int32_t>(std::lround(due)), least, I + 1);
        due -= keep;
        int32_t& n = count[at];
        row[n++] = 0;
        int32_t need = keep - least;
        for (int32_t J = 1; J < I && need > 0; ++J) {
          if (static_cast<int64_t>(random() % (I - J)) < need) {
            row[n++] = static_cast<uint16_t>(J);
            --need;
          }
        }
        if (I > 0) row[n++] = static_cast<uint16_t>(I);
      }
    }
  }
  count_->Set(count);
  index_->Set(index);
}

Record AttentionProblem::Cudnn() {
  Record record{.workload = "any",
                .method = "dense",
                .kernels = "cudnn",
                .tokens = problem_.sk_max,
                .sequences = problem_.sequences,
                .density = 1};
  if (dense_.Plan(problem_)) {
    record.ms = clock_.Time([&] {
      if (!dense_.Attend(problem_, stream_).ok()) Die("cuDNN failed");
    });
    record.kernel_error = Error(true);
  } else if (settings_.dense_ms > 0) {
    record.ms.median = settings_.dense_ms;
  }
  cudnn_ms_ = record.ms.median;
  record.tflops = Flops(true) / record.ms.median * 1e-9;
  cudnn_tflops_ = record.tflops;
  record.percent_of_cudnn = std::isnan(record.tflops) ? kNone : 100;
  return record;
}

Record AttentionProblem::Attend(const std::string& workload, const std::string& method,
                                const KernelSet& set) {
  Record record{.workload = workload,
                .method = method,
                .kernels = set.name,
                .tokens = problem_.sk_max,
                .sequences = problem_.sequences,
                .density = Density()};
  record.ms = clock_.Time([&] { EnqueueAttend(set); });
  record.tflops = Flops(false) / record.ms.median * 1e-9;
  record.percent_of_cudnn = 100 * record.tflops / cudnn_tflops_;
  record.bound_ms = record.density * cudnn_ms_ / kEfficiency + kOverheadMs;
  record.kernel_error = Error(false);
  return record;
}

void AttentionProblem::Run(const std::string& workload, Method method, Table* table) {
  Record common{.select_us = 1e3 * clock_.TimeGraph([&] { EnqueueSelect(method); }).median};
  if (method != Method::kDense) {
    common.mass_us = 1e3 * clock_.TimeGraph([&] { EnqueueMass(method); }).median;
    const std::vector<HeadReport> reports = report_->Get<HeadReport>();
    common.captured = 0;
    common.captured_head = common.captured_row = 1;
    for (const HeadReport& report : reports) {
      common.captured += report.captured_mass / static_cast<double>(reports.size());
      common.captured_head = std::min<double>(common.captured_head, report.captured_mass);
      common.captured_row = std::min<double>(common.captured_row, report.captured_mass_min);
    }
  }
  for (const KernelSet& set : kKernelSets) {
    if (!Runs(set)) continue;
    Record record = Attend(workload, Name(method), set);
    record.error = Error(true);
    record.select_us = common.select_us;
    record.mass_us = common.mass_us;
    record.captured = common.captured;
    record.captured_head = common.captured_head;
    record.captured_row = common.captured_row;
    record.pipeline_ms = PipelineMs(method, false, set);
    if (method == Method::kJoint) record.pipeline_mass_ms = PipelineMs(method, true, set);
    table->Add(record);
  }
}

cuda::Selection AttentionProblem::SelectionOf(Method method) const {
  const bool joint = method == Method::kJoint;
  return {.problem = problem_,
          .gamma = joint ? settings_.gamma : settings_.flexprefill_gamma,
          .flexprefill = {.tau = settings_.tau},
          .min_budget_tokens = joint ? 0 : settings_.min_budget,
          .workspace = selection_workspace_->as<void>(),
          .report = report_->as<HeadReport>()};
}

void AttentionProblem::EnqueueSelect(Method method) {
  const cuda::Selection selection = SelectionOf(method);
  const int multiprocessors = device_.multiprocessors();
  if (method == Method::kDense) {
    CHECK_CUDA(cuda::SelectCausal(selection, stream_));
  } else if (method == Method::kJoint) {
    CHECK_CUDA(cuda::JointEstimate(selection, multiprocessors, stream_));
    CHECK_CUDA(cuda::JointSelect(selection, multiprocessors, stream_));
  } else {
    CHECK_CUDA(cuda::FlexPrefillEstimate(selection, multiprocessors, stream_));
    CHECK_CUDA(cuda::FlexPrefillSelect(selection, multiprocessors, stream_));
  }
}

void AttentionProblem::EnqueueMass(Method method) {
  CHECK_CUDA(cuda::MeasureCapturedMass(SelectionOf(method), 0, device_.multiprocessors(), stream_));
}

void AttentionProblem::EnqueueAttend(const KernelSet& set) {
  CHECK_CUDA(
      set.attend(problem_, attend_workspace_->as<void>(), device_.multiprocessors(), stream_));
}

double AttentionProblem::PipelineMs(Method method, bool measure, const KernelSet& set) {
  return clock_
      .TimeGraph([&] {
        CHECK_CUDA(cuda::WriteSequences(problem_.host_sequence, problem_.sequences,
                                        const_cast<Sequence*>(problem_.sequence), stream_));
        EnqueueSelect(method);
        if (measure) EnqueueMass(method);
        EnqueueAttend(set);
      })
      .median;
}

double AttentionProblem::Density() const {
  double computed = 0, causal = 0;
  for (int32_t count : count_->Get<int32_t>()) computed += count;
  for (const Sequence& s : host_sequences_) causal += 0.5 * s.q_blocks * (s.q_blocks + 1.0);
  return computed / (causal * problem_.q_heads);
}

// 4 d per pair of a query and a key: two products of d multiply-adds.
double AttentionProblem::Flops(bool dense) const {
  const std::vector<int32_t> count = dense ? std::vector<int32_t>() : count_->Get<int32_t>();
  double pairs = 0;
  for (const Sequence& s : host_sequences_) {
    for (int64_t I = 0; I < s.q_blocks; ++I) {
      const double rows = std::min<int64_t>(problem_.block_size, s.sq - I * problem_.block_size);
      const double diagonal = rows * (rows + 1) / 2, block = rows * problem_.block_size;
      for (int h = 0; h < problem_.q_heads; ++h) {
        const auto blocks = dense ? I + 1 : count[h * problem_.rows + s.row_begin + I];
        pairs += diagonal + static_cast<double>(blocks - 1) * block;
      }
    }
  }
  return 4.0 * problem_.head_dim * pairs;
}

// Of o on the sampled queries: against exact dense attention, or over the same blocks.
double AttentionProblem::Error(bool dense) {
  const size_t bytes =
      size_t{kSampledQueries} * problem_.q_heads * problem_.head_dim * sizeof(float);
  const DeviceMemory got(bytes), want(bytes);
  const auto* queries = queries_->as<int32_t>();
  CHECK_CUDA(GatherOutput(problem_, queries, kSampledQueries, got.as<float>(), stream_));
  std::vector<float> expected = exact_dense_;
  if (!dense || expected.empty()) {
    CHECK_CUDA(AttendExactly(problem_, queries, kSampledQueries, dense, want.as<float>(), stream_));
    expected = want.Get<float>();
    if (dense) exact_dense_ = expected;
  }
  const std::vector<float> output = got.Get<float>();
  double error = 0, norm = 0;
  for (size_t i = 0; i < output.size(); ++i) {
    error += std::pow(static_cast<double>(output[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::isnan(error) ? INFINITY : std::sqrt(error / norm);
}

}  // namespace prefilld::bench
