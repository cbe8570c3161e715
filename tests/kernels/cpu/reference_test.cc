#include "kernels/cpu/reference.h"

#include <algorithm>
#include <cmath>

#include "tests/kernels/cpu/selection_case.h"

namespace prefilld::cpu {
namespace {

double CapturedMean(const Selected& selected) {
  double sum = 0;
  for (const HeadReport& head : selected.report) sum += head.captured_mass;
  return sum / static_cast<double>(selected.report.size());
}

TEST(Reference, DenseAttentionIsSoftmaxOfAllEarlierKeysTimesValues) {
  Case input({.q_heads = 2, .kv_heads = 1, .head_dim = 64, .sq = {20}, .sk = {150}});
  const AttentionArgs args = input.Args({.method = Method::kDense});
  ReferenceSelectBlocks(args);
  const ReferenceOutput out = ReferenceAttend(args);
  for (int h = 0; h < 2; ++h) {
    for (int t = 0; t < 20; ++t) {
      std::vector<double> o(64);
      double sum = 0;
      for (int j = 0; j <= 130 + t; ++j) {
        double dot = 0;
        for (int c = 0; c < 64; ++c) dot += input.q()[(t * 2 + h) * 64 + c] * input.k()[j * 64 + c];
        const double weight = std::exp(dot / 8);
        sum += weight;
        for (int c = 0; c < 64; ++c) o[c] += weight * input.v()[j * 64 + c];
      }
      EXPECT_NEAR(out.lse[h * 20 + t], std::log(sum), 1e-6);
      for (int c = 0; c < 64; ++c) {
        ASSERT_NEAR(out.o[(t * 2 + h) * 64 + c], o[c] / sum, 1e-6) << "row " << t << " c " << c;
      }
    }
  }
}

TEST(Reference, KeepingEveryBlockEqualsDense) {
  Case input({.q_heads = 2, .kv_heads = 1, .sq = {300}, .sk = {300}});
  const AttentionArgs dense = input.Args({.method = Method::kDense});
  ReferenceSelectBlocks(dense);
  const ReferenceOutput expected = ReferenceAttend(dense);
  const AttentionArgs joint =
      input.Args({.method = Method::kJoint});  // three blocks: all are forced
  ReferenceSelectBlocks(joint);
  EXPECT_EQ(joint.report[0].density, 1);
  const ReferenceOutput actual = ReferenceAttend(joint);
  EXPECT_EQ(actual.o, expected.o);
  EXPECT_EQ(actual.lse, expected.lse);
}

TEST(Reference, AttentionReadsOnlyBlocksOfTheIndex) {
  Case input({.q_heads = 1, .kv_heads = 1, .sq = {300}, .sk = {300}});
  const AttentionArgs args = input.Args({.method = Method::kDense});
  ReferenceSelectBlocks(args);
  args.index.count_at(0, 2) = 2;  // blocks 0 and 2 for the last row of blocks
  args.index.row_at(0, 2)[1] = 2;
  const ReferenceOutput before = ReferenceAttend(args);
  for (int t = 128; t < 256; ++t) input.v()[t * 64] = 1e6f;
  const ReferenceOutput after = ReferenceAttend(args);
  EXPECT_EQ(before.o[299 * 64], after.o[299 * 64]);
  EXPECT_NE(before.o[200 * 64], after.o[200 * 64]);
}

TEST(Reference, ZeroInputsAreQueryAwareFromEightBlocksOn) {
  for (int64_t n : {3, 4, 8, 16, 32}) {
    Case input(
        {.family = Family::kZero, .q_heads = 1, .kv_heads = 1, .sq = {n * 128}, .sk = {n * 128}});
    const Selected selected =
        ReferenceSelect(&input, {.method = Method::kFlexPrefill, .measure_captured_mass = false});
    EXPECT_EQ(selected.report[0].pattern, n <= 4 ? Pattern::kVerticalSlash : Pattern::kQueryAware)
        << "n " << n;
  }
}

TEST(Reference, JointCapturesABandOfWhichFlexPrefillLosesHalf) {
  Case input({.family = Family::kBand,
              .q_heads = 1,
              .kv_heads = 1,
              .head_dim = 128,
              .sq = {4096},
              .sk = {4096},
              .band_delta = 70});
  for (float& x : input.q()) x *= 4;  // a pure band: next to nothing lies off the diagonal
  // gamma .1 chooses one column and one diagonal, block offset 0, which holds 58 of 128 positions.
  const Selected flex = ReferenceSelect(&input, {.method = Method::kFlexPrefill, .gamma = 0.1});
  EXPECT_NEAR(CapturedMean(flex), 58.0 / 128, 0.06);
  const Selected joint = ReferenceSelect(&input, {.method = Method::kJoint, .gamma = 0.9});
  EXPECT_GT(CapturedMean(joint), 0.98);
  EXPECT_LT(joint.report[0].density, 0.3);  // column 0, two diagonals, two whole rows
}

TEST(Reference, RowsAreAscendingUniqueCausalAndHoldFirstAndOwnBlock) {
  for (Family family : kFamilies) {
    Case input({.family = family, .q_heads = 2, .kv_heads = 1, .sq = {1000}, .sk = {1000}});
    for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
      const SparsityPolicy policy = {.method = method, .gamma = 0.6, .block_size = 64};
      ExpectWellFormed(input, policy, ReferenceSelect(&input, policy));
    }
  }
}

TEST(Reference, HalfPrecisionInputsAreReadExactly) {
  Case input({.q_heads = 1, .kv_heads = 1, .sq = {1}, .sk = {1}});
  AttentionArgs args = input.Args({.method = Method::kDense});
  ReferenceSelectBlocks(args);
  args.shape.dtype = DType::kF16;
  args.shape.head_dim = 4;
  const uint16_t q[] = {0x3c00, 0, 0, 0}, k[] = {0x4248, 0, 0, 0};
  const uint16_t v[] = {0x3555, 0xfbff, 0x0001, 0x83ff};
  args.q = {q, 4, 4};
  args.k = {k, 4, 4};
  args.v = {v, 4, 4};
  args.softmax_scale = 1;
  const ReferenceOutput out = ReferenceAttend(args);
  EXPECT_EQ(out.lse[0], 3.140625);
  EXPECT_EQ(out.o, (std::vector<double>{0.333251953125, -65504, 0x1p-24, -1023 * 0x1p-24}));
}

}  // namespace
}  // namespace prefilld::cpu
