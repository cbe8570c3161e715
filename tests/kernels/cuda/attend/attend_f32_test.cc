// Stage 3 in F32 on the GPU against the double-precision oracle on the same index.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cuda/attend/attend.h"
#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

constexpr int kHeadDims[] = {8, 16, 32, 64, 80, 96, 128, 192, 256};
constexpr int kBlockSizes[] = {64, 128};

CaseOptions F32(CaseOptions options) {
  options.dtype = DType::kF32;
  return options;
}

class AttendF32OnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP() << "no GPU";
  }
  static void ExpectMatches(const CaseOptions& options, int keep_percent = 50, int sampled = 0) {
    CudaCase input(F32(options));
    const CudaCase::Rows rows = input.RandomRows(keep_percent);
    input.SetIndex(rows);
    ExpectMatchesOracle(input, rows, input.Run(AttendF32), sampled);
  }
};

// Small enough for compute-sanitizer: every path once.
TEST_F(AttendF32OnGpu, Smoke) {
  for (int d : {16, 64, 128, 192, 256}) {
    ExpectMatches({.q_heads = 2, .kv_heads = 1, .head_dim = d, .sq = {300}});
  }
  ExpectMatches({.q_heads = 2, .kv_heads = 1, .block_size = 64, .sq = {200}});
  ExpectMatches({.q_heads = 2,
                 .kv_heads = 1,
                 .sq = {100, 1, 130},
                 .sk = {290, 1, 130},
                 .layout = Layout::kPaged});
}

TEST_F(AttendF32OnGpu, MatchesTheOracleAtEveryLength) {
  for (int64_t tokens : {1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 1000}) {
    for (int block_size : kBlockSizes) {
      ExpectMatches({.q_heads = 3, .kv_heads = 1, .block_size = block_size, .sq = {tokens}});
    }
  }
}

TEST_F(AttendF32OnGpu, MatchesTheOracleInEveryHeadDimAndBlockSize) {
  for (int d : kHeadDims) {
    for (int block_size : kBlockSizes) {
      for (Layout layout : {Layout::kTokens, Layout::kHeads, Layout::kPaged}) {
        ExpectMatches(
            {.head_dim = d, .block_size = block_size, .sq = {450}, .sk = {600}, .layout = layout});
      }
    }
  }
}

TEST_F(AttendF32OnGpu, AlignsQueriesAfterAPrefixToAbsolutePositions) {
  for (const auto& [sq, sk] : {std::pair<int64_t, int64_t>{1, 2},
                               {1, 1000},
                               {128, 256},
                               {100, 300},
                               {172, 300},
                               {129, 514},
                               {200, 201}}) {
    for (int block_size : kBlockSizes) {
      ExpectMatches({.head_dim = 64, .block_size = block_size, .sq = {sq}, .sk = {sk}});
    }
  }
}

TEST_F(AttendF32OnGpu, KeepsRaggedSequencesApart) {
  for (Layout layout : {Layout::kTokens, Layout::kHeads, Layout::kPaged}) {
    for (int d : {32, 64, 128}) {
      ExpectMatches({.q_heads = 6,
                     .kv_heads = 2,
                     .head_dim = d,
                     .sq = {1, 300, 7, 128, 1, 513},
                     .sk = {1, 300, 200, 128, 129, 700},
                     .layout = layout,
                     .page_tokens = layout == Layout::kPaged ? 256 : 0});
    }
  }
}

TEST_F(AttendF32OnGpu, GroupsQueryHeadsOverTheirKvHead) {
  for (const auto& [q_heads, kv_heads] : {std::pair{9, 3}, {8, 8}, {7, 1}, {1, 1}}) {
    ExpectMatches({.q_heads = q_heads, .kv_heads = kv_heads, .head_dim = 64, .sq = {260}});
  }
}

TEST_F(AttendF32OnGpu, EveryCausalBlockIsDense) {
  for (int d : {64, 128}) ExpectMatches({.head_dim = d, .sq = {700}}, 100);
  ExpectMatches({.q_heads = 2, .kv_heads = 1, .head_dim = 64, .sq = {9000}}, 100, 4);
}

TEST_F(AttendF32OnGpu, HandlesPeakedScoresAndZeros) {
  ExpectMatches({.sq = {600}, .amplitude = 4});
  ExpectMatches({.sq = {500}, .sk = {700}, .family = Family::kZero});
}

TEST_F(AttendF32OnGpu, GivesARowWithoutABlockNothing) {
  for (int block_size : kBlockSizes) {
    CudaCase input(F32({.q_heads = 1, .kv_heads = 1, .block_size = block_size, .sq = {700}}));
    CudaCase::Rows rows = input.RandomRows(50);
    rows[1].clear();
    input.SetIndex(rows);
    const Output output = input.Run(AttendF32);
    const int64_t words = 128 * Words(DType::kF32);
    for (int64_t t = block_size; t < 2 * block_size; ++t) {
      EXPECT_EQ(output.lse[t], -std::numeric_limits<float>::infinity());
      for (int64_t w = t * words; w < (t + 1) * words; ++w) ASSERT_EQ(output.o[w], 0) << t;
    }
    EXPECT_GT(output.lse[2 * block_size], -100);
  }
}

TEST_F(AttendF32OnGpu, GivesTheSameBitsEveryTimeAndInAGraph) {
  CudaCase input(F32({.q_heads = 8, .kv_heads = 2, .sq = {1500, 700}, .sk = {1500, 1100}}));
  input.SetIndex(input.RandomRows(30));
  const Output first = input.Run(AttendF32);
  EXPECT_TRUE(first == input.Run(AttendF32, 0x5A));
  Graph graph([&](cudaStream_t stream) {
    EXPECT_CUDA_OK(AttendF32(input.problem(), input.attend_workspace(), Multiprocessors(), stream));
  });
  input.PoisonOutput();
  graph.Replay();
  EXPECT_TRUE(first == input.GetOutput());
}

TEST_F(AttendF32OnGpu, NeedsNoLse) {
  CudaCase input(F32({.sq = {300}}));
  input.SetIndex(input.RandomRows(50));
  const Output expected = input.Run(AttendF32);
  Problem problem = input.problem();
  problem.lse = nullptr;
  input.PoisonOutput();
  EXPECT_CUDA_OK(AttendF32(problem, nullptr, Multiprocessors(), nullptr));
  EXPECT_CUDA_OK(cudaDeviceSynchronize());
  EXPECT_EQ(expected.o, input.GetOutput().o);
}

// What is not a number stays in its sequence, and behind its position.
TEST_F(AttendF32OnGpu, KeepsNaNToItself) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const CaseOptions options =
        F32({.q_heads = 1, .kv_heads = 1, .sq = {200, 300, 250}, .sk = {200, 400, 250}});
    const int64_t d = options.head_dim, words = d * Words(DType::kF32);
    CudaCase clean(options);
    CudaCase dirty(options, [&](cpu::Case* wide) {
      std::fill(&wide->q()[200 * d], &wide->q()[500 * d], poison);
      std::fill(&wide->k()[200 * d], &wide->k()[600 * d], poison);
      std::fill(&wide->v()[200 * d], &wide->v()[600 * d], poison);
      std::fill(&wide->k()[849 * d], &wide->k()[850 * d], poison);
    });
    const CudaCase::Rows rows = clean.RandomRows(60);
    clean.SetIndex(rows);
    dirty.SetIndex(rows);
    const Output a = clean.Run(AttendF32), b = dirty.Run(AttendF32);
    for (int64_t t = 0; t < 749; ++t) {
      if (t >= 200 && t < 500) continue;
      ASSERT_EQ(a.lse[t], b.lse[t]) << "token " << t << " poison " << poison;
      ASSERT_TRUE(std::equal(&a.o[t * words], &a.o[(t + 1) * words], &b.o[t * words])) << t;
    }
  }
}

}  // namespace
}  // namespace prefilld::cuda
