// Attention on the CPU against the machine's multiply-add peak.
//
//   Fma/<threads>                   peak: independent multiply-adds in registers, GFLOP/s
//   Dense/<S>/<dtype>/<d>/<q>/<kv>  stage 3 over every causal block, GFLOP/s of causal pairs
//   Sparse/<S>/<percent>            the same over that share of the blocks (F32, d 64, 9 over 3)
//
// GFLOP/s counts 4 d per causal pair kept, blocks on the diagonal in half. Two threads.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/attention/attention_benchmark.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Returns the FLOPs done; 12 chains hide the latency and fit every register file.
int64_t MultiplyAdd(int64_t steps, float* sink) {
  const hn::CappedTag<float, 16> d;
  hn::Vec<decltype(d)> sum[12];
  for (auto& s : sum) s = hn::Set(d, *sink);
  const auto a = hn::Set(d, 0.999f);
  const auto b = hn::Set(d, 0.001f);
  for (int64_t step = 0; step < steps; ++step) {
    HWY_UNROLL(12)
    for (int i = 0; i < 12; ++i) sum[i] = hn::MulAdd(sum[i], a, b);
  }
  auto total = sum[0];
  for (int i = 1; i < 12; ++i) total = hn::Add(total, sum[i]);
  *sink = hn::GetLane(hn::SumOfLanes(d, total));
  return steps * 12 * 2 * static_cast<int64_t>(hn::Lanes(d));
}

}  // namespace prefilld::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::cpu {
namespace {

HWY_EXPORT(MultiplyAdd);

constexpr int kThreads = 2;

void Fma(benchmark::State& state) {
  const int threads = static_cast<int>(state.range(0));
  int64_t flops = 0;
  for (auto _ : state) {
#pragma omp parallel num_threads(threads) reduction(+ : flops)
    {
      float sink = 1;
      flops += HWY_DYNAMIC_DISPATCH(MultiplyAdd)(1 << 22, &sink);
      benchmark::DoNotOptimize(sink);
    }
  }
  state.counters["GFLOP/s"] =
      benchmark::Counter(static_cast<double>(flops) * 1e-9, benchmark::Counter::kIsRate);
  state.SetLabel(InstructionSet());
}

// One sequence of random queries, keys and values, with an index that keeps `percent` of the blocks
// of every row: the first, the diagonal, and others at random.
struct Call {
  std::vector<uint8_t> q, k, v, o;
  std::vector<int32_t> count;
  std::vector<uint16_t> index;
  std::vector<float> lse;
  AttentionArgs args;
  double flops = 0;

  Call(int64_t tokens, DType dtype, int d, int q_heads, int kv_heads, int percent) {
    args.shape = {dtype, q_heads, kv_heads, d, {0, tokens}, {0, tokens}};
    args.softmax_scale = 0.125;
    args.q = {Random(q, tokens * q_heads * d, dtype), int64_t{q_heads} * d, d};
    args.k = {Random(k, tokens * kv_heads * d, dtype), int64_t{kv_heads} * d, d};
    args.v = {Random(v, tokens * kv_heads * d, dtype), int64_t{kv_heads} * d, d};
    o.resize(q.size());
    args.o = {o.data(), args.q.token_stride, d};
    lse.resize(static_cast<size_t>(q_heads * tokens));
    args.lse = lse.data();
    FillIndex(tokens, percent);
  }

 private:
  const void* Random(std::vector<uint8_t>& bytes, int64_t count_of, DType dtype) {
    bytes.resize(static_cast<size_t>(count_of) * SizeOf(dtype));
    std::minstd_rand random(7);
    std::uniform_real_distribution<float> uniform(-1.7f, 1.7f);
    for (int64_t i = 0; i < count_of; ++i) {
      const float value = uniform(random);
      if (dtype == DType::kF32) {
        reinterpret_cast<float*>(bytes.data())[i] = value;
      } else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        reinterpret_cast<uint16_t*>(bytes.data())[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
    return bytes.data();
  }

  void FillIndex(int64_t tokens, int percent) {
    const int64_t rows = SplitIntoBlocks(args.shape, 128).front().q_blocks;
    const int64_t heads = args.shape.q_heads;
    count.resize(static_cast<size_t>(heads * rows));
    index.resize(static_cast<size_t>(heads * rows * rows));
    args.index = {count.data(), index.data(), rows, rows};
    std::minstd_rand random(11);
    double pairs = 0;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t row = 0; row < rows; ++row) {
        int32_t kept = 0;
        for (int64_t block = 0; block <= row; ++block) {
          const bool keep =
              block == 0 || block == row || static_cast<int>(random() % 100) < percent;
          if (keep) args.index.row_at(h, row)[kept++] = static_cast<uint16_t>(block);
        }
        args.index.count_at(h, row) = kept;
        const double queries = static_cast<double>(std::min<int64_t>(128, tokens - row * 128));
        pairs += (kept - 1) * 128 * queries + queries * (queries + 1) / 2;
      }
    }
    flops = pairs * 4 * args.shape.head_dim;
  }
};

void RunCall(benchmark::State& state, Call& call) {
  Attention attention(kThreads);
  for (auto _ : state) {
    if (!attention.Run(call.args).ok()) state.SkipWithError("no memory");
  }
  state.counters["GFLOP/s"] =
      benchmark::Counter(call.flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.SetLabel(InstructionSet());
}

void Dense(benchmark::State& state) {
  Call call(state.range(0), static_cast<DType>(state.range(1)), static_cast<int>(state.range(2)),
            static_cast<int>(state.range(3)), static_cast<int>(state.range(4)), 100);
  RunCall(state, call);
}

void Sparse(benchmark::State& state) {
  Call call(state.range(0), DType::kF32, 64, 9, 3, static_cast<int>(state.range(1)));
  RunCall(state, call);
}

constexpr int64_t kF32 = static_cast<int64_t>(DType::kF32);
constexpr int64_t kBF16 = static_cast<int64_t>(DType::kBF16);

BENCHMARK(Fma)->Arg(1)->Arg(kThreads)->MeasureProcessCPUTime()->UseRealTime()->Unit(
    benchmark::kMillisecond);
BENCHMARK(Dense)
    ->ArgsProduct({{1024, 2048, 4096, 8192}, {kF32, kBF16}, {64}, {9}, {3}})
    ->Args({4096, kF32, 96, 4, 1})
    ->Args({4096, kF32, 128, 4, 1})
    ->Args({4096, kF32, 256, 4, 1})
    ->MeasureProcessCPUTime()
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(Sparse)
    ->ArgsProduct({{8192}, {10, 30}})
    ->MeasureProcessCPUTime()
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace prefilld::cpu

BENCHMARK_MAIN();
#endif  // HWY_ONCE
