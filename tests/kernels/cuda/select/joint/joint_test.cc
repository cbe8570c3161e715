// joint's stages 1 and 2 on the GPU against the double-precision oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/select/selection.h"
#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

SparsityPolicy Joint(double gamma = 0.9) { return {.method = Method::kJoint, .gamma = gamma}; }

class JointOnGpu : public SelectionOnGpu {
 protected:
  void ExpectSame(const CaseOptions& options, const SparsityPolicy& policy = Joint()) {
    ExpectSelects(options, policy, &sum_);
  }
};

// In every row of dtypes.
class JointInEveryDType : public JointOnGpu, public testing::WithParamInterface<DTypeRow> {
 protected:
  void ExpectSameIn(DType dtype, CaseOptions options) {
    options.dtype = dtype;
    ExpectSame(options);
  }
};

INSTANTIATE_TEST_SUITE_P(Every, JointInEveryDType, testing::ValuesIn(kDTypeRows),
                         [](const auto& row) { return std::string(row.param.name); });

// Small enough for compute-sanitizer: every path once.
TEST_P(JointInEveryDType, Smoke) {
  const DType dtype = GetParam().dtypes[0];
  ExpectSameIn(dtype,
               {.q_heads = 2, .kv_heads = 1, .head_dim = 64, .sq = {700}, .family = Family::kBand});
  for (int d : {GetParam().head_dims[0], 128}) {
    ExpectSameIn(dtype,
                 {.q_heads = 2, .kv_heads = 1, .head_dim = d, .block_size = 64, .sq = {300}});
  }
  ExpectSameIn(dtype, {.q_heads = 2,
                       .kv_heads = 1,
                       .sq = {100, 1, 130},
                       .sk = {490, 1, 130},
                       .layout = Layout::kPaged});
}

TEST_P(JointInEveryDType, MatchesTheOracleInEveryFamilyAtEveryLength) {
  const DType dtype = GetParam().dtypes[0];
  for (Family family : cpu::kFamilies) {
    for (int64_t length : cpu::kLengths) {
      ExpectSameIn(dtype, {.head_dim = 64, .sq = {length}, .family = family});
    }
  }
  // SmolLM2-135M's heads, and in F32 rows of the map that the 16-bit kernels leave in scratch too.
  ExpectSameIn(
      dtype,
      {.q_heads = 9, .kv_heads = 3, .head_dim = 64, .sq = {5000}, .family = Family::kNeedle});
}

TEST_P(JointInEveryDType, MatchesTheOracleWhereLogitsAreFarFromZero) {
  for (DType dtype : GetParam().dtypes) {
    for (int block_size : {64, 128}) {
      for (Layout layout : {Layout::kTokens, Layout::kPaged}) {
        ExpectSameIn(dtype, {.q_heads = 6,
                             .kv_heads = 1,
                             .block_size = block_size,
                             .sq = {40, 3000},
                             .layout = layout,
                             .family = Family::kFar});
      }
    }
  }
}

TEST_P(JointInEveryDType, MatchesTheOracleInEveryHeadDimAndBlockSize) {
  for (DType dtype : GetParam().dtypes) {
    for (int d : GetParam().head_dims) {
      for (int block_size : {64, 128}) {
        for (Layout layout : {Layout::kTokens, Layout::kHeads, Layout::kPaged}) {
          CaseOptions options{.head_dim = d,
                              .block_size = block_size,
                              .sq = {1500},
                              .layout = layout,
                              .family = Family::kBand};
          ExpectSameIn(dtype, options);
          options.sq = {1, 300, 7, 1300};
          options.sk = {1, 300, 200, 2000};
          ExpectSameIn(dtype, options);
        }
      }
    }
  }
}

TEST_F(JointOnGpu, ObeysGammaAndBudgetsInF32) {
  for (double gamma : {0.02, 0.3, 0.8, 0.99}) {
    ExpectSame({.dtype = DType::kF32, .head_dim = 32, .sq = {3000}}, Joint(gamma));
  }
  for (const auto& [least, most] :
       {std::pair<int64_t, int64_t>{1024, 4096}, {0, 512}, {600, 900}}) {
    SparsityPolicy policy = Joint();
    policy.min_budget_tokens = least;
    policy.max_budget_tokens = most;
    ExpectSame({.dtype = DType::kF32, .head_dim = 64, .sq = {2500}, .family = Family::kBand},
               policy);
  }
}

TEST_F(JointOnGpu, MatchesTheOracleAtEveryGamma) {
  for (double gamma : {0.02, 0.1, 0.3, 0.6, 0.8, 0.95, 0.99, 0.9999}) {
    for (Family family : {Family::kRandom, Family::kBand, Family::kNeedle}) {
      ExpectSame({.sq = {3000}, .family = family}, Joint(gamma));
    }
  }
}

TEST_F(JointOnGpu, MatchesTheOracleAfterAPrefixAndInRaggedBatches) {
  for (int block_size : {64, 128}) {
    for (Layout layout : {Layout::kTokens, Layout::kPaged}) {
      for (Family family : {Family::kRandom, Family::kBand}) {
        ExpectSame({.block_size = block_size,
                    .sq = {1, 300, 7, 128, 1, 1300, 63, 500},
                    .sk = {1, 300, 200, 128, 1290, 2000, 64, 4000},
                    .layout = layout,
                    .family = family});
      }
    }
  }
}

TEST_F(JointOnGpu, MatchesTheOracleForEveryGroupOfHeads) {
  for (const auto& [q_heads, kv_heads] :
       {std::pair{8, 8}, {8, 2}, {7, 1}, {1, 1}, {12, 4}, {16, 1}}) {
    ExpectSame({.q_heads = q_heads, .kv_heads = kv_heads, .sq = {1100}, .family = Family::kNeedle});
  }
}

TEST_F(JointOnGpu, ObeysBudgets) {
  for (const auto& [least, most] :
       {std::pair<int64_t, int64_t>{1024, std::numeric_limits<int64_t>::max()},
        {0, 512},
        {0, 1},
        {600, 900},
        {2000, 300}}) {
    SparsityPolicy policy = Joint();
    policy.min_budget_tokens = least;
    policy.max_budget_tokens = most;
    ExpectSame({.sq = {2500}, .family = Family::kBand}, policy);
    ExpectSame({.sq = {700}, .sk = {2500}}, policy);
  }
}

TEST_F(JointOnGpu, MatchesTheOracleOnLongSequences) {
  for (Family family : {Family::kBand, Family::kNeedle, Family::kRandom}) {
    ExpectSame({.sq = {16500}, .family = family});
    ExpectSame({.q_heads = 8,
                .kv_heads = 8,
                .head_dim = 64,
                .sq = {9000},
                .sk = {33000},
                .family = family});
  }
}

TEST_F(JointOnGpu, GivesTheSameRowsEveryTimeAndInAGraph) {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    CudaCase input(
        {.dtype = dtype, .sq = {3000, 700}, .sk = {3000, 1000}, .family = Family::kBand});
    const Selected first = input.Select(Joint());
    for (int poison : {0xFF, 0x00, 0x5A}) ExpectSameSelection(first, input.Select(Joint(), poison));
    const Selection selection = input.SelectionOf(Joint());
    Graph graph([&](cudaStream_t stream) {
      EXPECT_CUDA_OK(input.EnqueueSelect(selection, Method::kJoint, stream));
    });
    for (int replay = 0; replay < 3; ++replay) {
      input.PoisonSelection(0xFF);
      graph.Replay();
      ExpectSameSelection(first, input.GetSelected());
    }
  }
}

TEST_F(JointOnGpu, PermutedHeadsGivePermutedRows) {
  const CaseOptions options{.q_heads = 4, .kv_heads = 1, .sq = {2000}, .family = Family::kBand};
  const int64_t d = options.head_dim;
  CudaCase input(options);
  CudaCase permuted(options, [&](cpu::Case* wide) {
    const std::vector<float> q = wide->q();
    for (int64_t t = 0; t < 2000; ++t) {
      for (int64_t h = 0; h < 4; ++h) {
        std::copy_n(&q[(t * 4 + (h + 1) % 4) * d], d, &wide->q()[(t * 4 + h) * d]);
      }
    }
  });
  CudaCase::Rows rows = input.Select(Joint()).rows;
  std::rotate(rows.begin(), rows.begin() + input.problem().rows, rows.end());
  EXPECT_EQ(permuted.Select(Joint()).rows, rows);
}

// No crash, no hang, well-formed rows; other sequences as if nothing had been.
TEST_F(JointOnGpu, SurvivesAnyInput) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto& [dtype, which] :
       {std::pair(DType::kBF16, 0), {DType::kBF16, 1}, {DType::kF32, 0}, {DType::kF32, 1}}) {
    const CaseOptions options{
        .dtype = dtype, .sq = {1000, 800}, .sk = {1300, 800}, .family = Family::kBand};
    CudaCase clean(options);
    const Selected expected = clean.Select(Joint());
    const int64_t first = clean.sequences()[1].row_begin;
    for (const float poison : {std::numeric_limits<float>::quiet_NaN(), inf, -inf, 3e38f}) {
      for (size_t step : {1u, 1001u}) {
        CudaCase input(options, [&](cpu::Case* wide) {
          const size_t q_end = 1000 * options.q_heads * options.head_dim;
          const size_t k_end = 1300 * options.kv_heads * options.head_dim;
          if (which == 0) {
            for (size_t i = 0; i < q_end; i += step) wide->q()[i] = poison;
          }
          if (which == 1) {
            for (size_t i = 0; i < k_end; i += step) wide->k()[i] = poison;
          }
        });
        const Selected selected = input.Select(Joint());
        ExpectWellFormed(input, selected);
        for (int h = 0; h < options.q_heads; ++h) {
          for (int64_t row = first; row < input.problem().rows; ++row) {
            const int64_t at = h * input.problem().rows + row;
            ASSERT_EQ(selected.rows[at], expected.rows[at]) << "head " << h << " row " << row;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace prefilld::cuda
