// FlexPrefill's stages 1 and 2 on the GPU against the double-precision oracle.
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

SparsityPolicy FlexPrefill(double gamma = 0.9, double tau = 0.1) {
  return {.method = Method::kFlexPrefill, .gamma = gamma, .flexprefill = {.tau = tau}};
}

class FlexPrefillOnGpu : public SelectionOnGpu {
 protected:
  void ExpectSame(const CaseOptions& options, const SparsityPolicy& policy = FlexPrefill()) {
    ExpectSelects(options, policy, &sum_);
  }
};

// In every row of dtypes.
class FlexPrefillInEveryDType : public FlexPrefillOnGpu,
                                public testing::WithParamInterface<DTypeRow> {
 protected:
  void ExpectSameIn(DType dtype, CaseOptions options,
                    const SparsityPolicy& policy = FlexPrefill()) {
    options.dtype = dtype;
    ExpectSame(options, policy);
  }
};

INSTANTIATE_TEST_SUITE_P(Every, FlexPrefillInEveryDType, testing::ValuesIn(kDTypeRows),
                         [](const auto& row) { return std::string(row.param.name); });

// Small enough for compute-sanitizer: every path once.
TEST_P(FlexPrefillInEveryDType, Smoke) {
  const DType dtype = GetParam().dtypes[0];
  ExpectSameIn(dtype,
               {.q_heads = 2, .kv_heads = 1, .head_dim = 64, .sq = {700}, .family = Family::kBand});
  for (int d : {GetParam().head_dims[0], 128}) {
    ExpectSameIn(dtype,
                 {.q_heads = 2, .kv_heads = 1, .head_dim = d, .block_size = 64, .sq = {300}});
  }
  ExpectSameIn(dtype,
               {.q_heads = 2,
                .kv_heads = 1,
                .sq = {500, 1, 300},
                .layout = Layout::kPaged,
                .family = Family::kFaint},
               FlexPrefill(.9, 2));
}

TEST_P(FlexPrefillInEveryDType, MatchesTheOracleInEveryFamilyAtEveryLength) {
  const DType dtype = GetParam().dtypes[0];
  for (Family family : cpu::kFamilies) {
    for (int64_t length : cpu::kLengths) {
      ExpectSameIn(dtype, {.head_dim = 64, .sq = {length}, .family = family});
    }
  }
  ExpectSameIn(
      dtype,
      {.q_heads = 9, .kv_heads = 3, .head_dim = 64, .sq = {5000}, .family = Family::kNeedle});
}

TEST_P(FlexPrefillInEveryDType, MatchesTheOracleWhereLogitsAreFarFromZero) {
  for (DType dtype : GetParam().dtypes) {
    for (int block_size : {64, 128}) {
      for (int q_heads : {2, 12}) {
        ExpectSameIn(dtype, {.q_heads = q_heads,
                             .kv_heads = 2,
                             .block_size = block_size,
                             .sq = {2000},
                             .family = Family::kFar});
      }
    }
  }
}

TEST_P(FlexPrefillInEveryDType, MatchesTheOracleInEveryHeadDimAndBlockSize) {
  for (DType dtype : GetParam().dtypes) {
    for (int d : GetParam().head_dims) {
      for (int block_size : {64, 128}) {
        for (Layout layout : {Layout::kTokens, Layout::kHeads, Layout::kPaged}) {
          for (const std::vector<int64_t>& sq :
               {std::vector<int64_t>{1500}, std::vector<int64_t>{1, 300, 257, 1290}}) {
            ExpectSameIn(dtype, {.head_dim = d,
                                 .block_size = block_size,
                                 .sq = sq,
                                 .layout = layout,
                                 .family = Family::kBand});
          }
        }
      }
    }
  }
}

TEST_F(FlexPrefillOnGpu, ObeysGammaAndTauInF32) {
  for (int d : {24, 64}) {
    for (double gamma : {0.02, 0.8, 0.99}) {
      for (double tau : {0.0, 2.0}) {
        for (Family family : {Family::kRandom, Family::kFaint}) {
          ExpectSame({.dtype = DType::kF32, .head_dim = d, .sq = {2000}, .family = family},
                     FlexPrefill(gamma, tau));
        }
      }
    }
  }
}

// tau 0 makes no head query-aware, tau 2 every one without an exact zero.
TEST_F(FlexPrefillOnGpu, MatchesTheOracleAtEveryGammaAndTau) {
  for (double gamma : {0.02, 0.3, 0.8, 0.95, 0.99}) {
    for (double tau : {0.0, 0.1, 2.0}) {
      for (Family family : {Family::kRandom, Family::kFaint, Family::kNeedle}) {
        ExpectSame({.head_dim = 64, .sq = {2000}, .family = family}, FlexPrefill(gamma, tau));
      }
    }
  }
}

TEST_F(FlexPrefillOnGpu, MatchesTheOracleInRaggedBatches) {
  for (int block_size : {64, 128}) {
    for (Layout layout : {Layout::kTokens, Layout::kPaged}) {
      for (Family family : {Family::kRandom, Family::kFaint, Family::kBand}) {
        ExpectSame({.block_size = block_size,
                    .sq = {1, 300, 257, 128, 1290, 2000, 64, 256},
                    .layout = layout,
                    .family = family});
      }
    }
  }
}

TEST_F(FlexPrefillOnGpu, MatchesTheOracleForEveryGroupOfHeads) {
  for (const auto& [q_heads, kv_heads] :
       {std::pair{8, 8}, {8, 2}, {7, 1}, {1, 1}, {12, 4}, {16, 1}}) {
    ExpectSame({.q_heads = q_heads, .kv_heads = kv_heads, .sq = {1100}, .family = Family::kNeedle});
  }
}

TEST_F(FlexPrefillOnGpu, ObeysBudgets) {
  for (const auto& [least, most] :
       {std::pair<int64_t, int64_t>{kFlexPrefillMinBudget, std::numeric_limits<int64_t>::max()},
        {0, 512},
        {0, 1},
        {600, 900},
        {1000, 300}}) {
    for (double tau : {0.1, 2.0}) {
      SparsityPolicy policy = FlexPrefill(.9, tau);
      policy.min_budget_tokens = least;
      policy.max_budget_tokens = most;
      for (int64_t tokens : {1000, 1024, 1025, 2700}) {
        ExpectSame({.sq = {tokens}, .family = Family::kFaint}, policy);
      }
    }
  }
}

TEST_F(FlexPrefillOnGpu, MatchesTheOracleOnLongSequences) {
  for (Family family : {Family::kBand, Family::kNeedle, Family::kRandom, Family::kFaint}) {
    ExpectSame({.sq = {16500}, .family = family}, FlexPrefill(.95));
    ExpectSame({.q_heads = 2, .kv_heads = 2, .head_dim = 64, .sq = {33000}, .family = family});
  }
}

TEST_F(FlexPrefillOnGpu, GivesTheSameRowsEveryTimeAndInAGraph) {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    CudaCase input({.dtype = dtype, .sq = {3000, 700}, .family = Family::kFaint});
    const Selected first = input.Select(FlexPrefill());
    for (int poison : {0xFF, 0x00, 0x5A}) {
      ExpectSameSelection(first, input.Select(FlexPrefill(), poison));
    }
    const Selection selection = input.SelectionOf(FlexPrefill());
    Graph graph([&](cudaStream_t stream) {
      EXPECT_CUDA_OK(input.EnqueueSelect(selection, Method::kFlexPrefill, stream));
    });
    for (int replay = 0; replay < 3; ++replay) {
      input.PoisonSelection(0xFF);
      graph.Replay();
      ExpectSameSelection(first, input.GetSelected());
    }
  }
}

// No crash, no hang, well-formed rows; other sequences as if nothing had been.
TEST_F(FlexPrefillOnGpu, SurvivesAnyInput) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const auto& [dtype, tau] : {std::pair(DType::kBF16, 0.1),
                                   {DType::kBF16, 2.0},
                                   {DType::kF32, 0.1},
                                   {DType::kF32, 2.0}}) {
    const CaseOptions options{.dtype = dtype, .sq = {1000, 800}, .family = Family::kBand};
    CudaCase clean(options);
    const Selected expected = clean.Select(FlexPrefill(.9, tau));
    const int64_t first = clean.sequences()[1].row_begin;
    for (const float poison : {std::numeric_limits<float>::quiet_NaN(), inf, -inf, 3e38f}) {
      for (int which : {0, 1}) {
        for (size_t step : {1u, 1001u}) {
          CudaCase input(options, [&](cpu::Case* wide) {
            const size_t q_end = 1000 * options.q_heads * options.head_dim;
            const size_t k_end = 1000 * options.kv_heads * options.head_dim;
            if (which == 0) {
              for (size_t i = 0; i < q_end; i += step) wide->q()[i] = poison;
            }
            if (which == 1) {
              for (size_t i = 0; i < k_end; i += step) wide->k()[i] = poison;
            }
          });
          const Selected selected = input.Select(FlexPrefill(.9, tau));
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
}

}  // namespace
}  // namespace prefilld::cuda
