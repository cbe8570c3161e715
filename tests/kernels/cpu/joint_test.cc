#include "kernels/cpu/joint.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/probe.h"
#include "tests/kernels/cpu/selection_case.h"

namespace prefilld::cpu {
namespace {

SparsityPolicy Policy(double gamma, int block_size = 128) {
  return {.method = Method::kJoint,
          .gamma = gamma,
          .block_size = block_size,
          .measure_captured_mass = false};
}

// One row a block, each with its mass on the given key blocks; the rest of it on its own block.
JointMap MapOf(int64_t n, const std::vector<std::vector<std::pair<int64_t, double>>>& rows) {
  JointMap map;
  map.mass.resize(rows.size() * n);
  for (size_t r = 0; r < rows.size(); ++r) {
    map.query_block.push_back(static_cast<int64_t>(r));
    double rest = 1;
    for (const auto& [J, mass] : rows[r]) {
      map.mass[r * n + J] = mass;
      rest -= mass;
    }
    map.mass[r * n + r] += rest;
  }
  return map;
}

TEST(ProbeRows, OneRowAStratumByRadicalInverse) {
  EXPECT_EQ(ProbeRows(3), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(MeasuredRows(3), (std::vector<int64_t>{0, 1, 2}));
  const std::vector<int64_t> probe = ProbeRows(6400), measured = MeasuredRows(6400);
  ASSERT_EQ(probe.size(), 64u);
  EXPECT_EQ(std::vector<int64_t>(probe.begin(), probe.begin() + 5),
            (std::vector<int64_t>{0, 150, 225, 375, 412}));  // u = 0, 1/2, 1/4, 3/4, 1/8
  EXPECT_EQ(std::vector<int64_t>(measured.begin(), measured.begin() + 5),
            (std::vector<int64_t>{100, 150, 275, 325, 487}));
  EXPECT_EQ(probe[63], 6398);  // u = 63/64
  EXPECT_EQ(measured[63], 6301);
  for (int64_t sq : {64, 65, 100, 127, 4097, 131072}) {
    for (const std::vector<int64_t>& rows : {ProbeRows(sq), MeasuredRows(sq)}) {
      EXPECT_TRUE(std::is_sorted(rows.begin(), rows.end()));
      EXPECT_GE(rows.front(), 0);
      EXPECT_LT(rows.back(), sq);
    }
  }
}

TEST(BlockMass, OfZeroInputsIsTheShareOfKeys) {
  Case input({.family = Family::kZero, .q_heads = 2, .kv_heads = 1, .sq = {40}, .sk = {300}});
  const AttentionArgs args = input.Args(Policy(.9));
  BlockMass probe;
  probe.Probe(args, std::vector<int>{1}, ProbeRows, 1);
  std::vector<double> mass;
  probe.Read(0, 1, &mass);
  for (int64_t r = 0; r < 40; ++r) {
    const double keys = static_cast<double>(260 + r + 1);
    EXPECT_DOUBLE_EQ(mass[r * 3], 128 / keys);
    EXPECT_DOUBLE_EQ(mass[r * 3 + 1], 128 / keys);
    EXPECT_DOUBLE_EQ(mass[r * 3 + 2], (keys - 256) / keys);
  }
}

TEST(JointLines, ForcedLinesAloneWhereTheyCoverEnough) {
  const JointLines lines =
      ChooseLines(MapOf(8, std::vector<std::vector<std::pair<int64_t, double>>>(8)), 8, .9);
  EXPECT_EQ(lines.vertical, (std::vector<uint8_t>{1, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(lines.diagonal, (std::vector<uint8_t>{1, 1, 0, 0, 0, 0, 0, 0}));
}

TEST(JointLines, TakeTheLineThatGainsMostPerBlock) {
  // Block 2 answers rows 4 to 7, and offset 3 nothing that block 2 does not.
  std::vector<std::vector<std::pair<int64_t, double>>> rows(10);
  for (size_t r = 4; r < 8; ++r) rows[r] = {{2, .8}};
  const JointLines lines = ChooseLines(MapOf(10, rows), 10, .9);
  EXPECT_EQ(lines.vertical, (std::vector<uint8_t>{1, 0, 1, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(std::count(lines.diagonal.begin(), lines.diagonal.end(), 1), 2);
}

TEST(JointLines, TakeDiagonalsToo) {
  std::vector<std::vector<std::pair<int64_t, double>>> rows(10);
  for (int64_t r = 4; r < 8; ++r) rows[r] = {{r - 3, .8}};
  const JointLines lines = ChooseLines(MapOf(10, rows), 10, .9);
  EXPECT_EQ(lines.diagonal, (std::vector<uint8_t>{1, 1, 0, 1, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(std::count(lines.vertical.begin(), lines.vertical.end(), 1), 1);
}

TEST(JointLines, NoThresholdMeansForcedLinesAlone) {
  std::vector<std::vector<std::pair<int64_t, double>>> rows(10);
  for (int64_t r = 4; r < 8; ++r) rows[r] = {{2, 1}};
  for (double gamma : {0.0, -.05}) {
    const JointLines lines = ChooseLines(MapOf(10, rows), 10, gamma);
    EXPECT_EQ(std::count(lines.vertical.begin(), lines.vertical.end(), 1), 1);
    EXPECT_EQ(std::count(lines.diagonal.begin(), lines.diagonal.end(), 1), 2);
  }
}

TEST(JointLines, FortyRoundsWithoutReachingKeepEveryBlock) {
  // One row whose blocks are each worth .49 of the one before: a round takes one of them.
  const int64_t n = 200;
  JointMap map = {.query_block = {150}, .mass = std::vector<double>(n)};
  double mass = .51;
  for (int64_t J = 2; J < 140; ++J, mass *= .49) map.mass[J] = mass;
  EXPECT_TRUE(ChooseLines(map, n, 1 - 1e-9).reached);
  const JointLines lines = ChooseLines(map, n, 1 - 1e-13);
  EXPECT_FALSE(lines.reached);
  EXPECT_TRUE(lines.Keep(170, 100));
}

TEST(Joint, ChoosesExactlyTheBlocksOfTheReference) {
  for (Family family : kFamilies) {
    for (int64_t length : kLengths) {
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        const int d = length % 2 ? 64 : 128;
        Case input({.family = family,
                    .dtype = dtype,
                    .q_heads = length > 1000 ? 1 : 2,
                    .kv_heads = 1,
                    .head_dim = d,
                    .sq = {length},
                    .sk = {length}});
        for (double gamma : {.05, .9, .95}) {
          SCOPED_TRACE(Describe(family, length, dtype, gamma));
          const Selected actual = Select(&input, Policy(gamma));
          ExpectWellFormed(input, Policy(gamma), actual);
          ExpectSame(actual, ReferenceSelect(&input, Policy(gamma)));
        }
      }
    }
  }
}

TEST(Joint, PrefixesRaggedBatchesAndSmallBlocksMatchTheReference) {
  for (Family family : kFamilies) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      Case input({.family = family,
                  .dtype = dtype,
                  .sq = {1, 200, 900, 33, 700, 129},
                  .sk = {1, 1300, 1900, 65, 700, 1000}});
      for (int block_size : {64, 128}) {
        SCOPED_TRACE(Describe(family, block_size, dtype, .9));
        const SparsityPolicy policy = Policy(.9, block_size);
        const Selected actual = Select(&input, policy);
        ExpectWellFormed(input, policy, actual);
        ExpectSame(actual, ReferenceSelect(&input, policy));
      }
    }
  }
}

TEST(Joint, BudgetsMatchTheReferenceAndHold) {
  for (Family family : {Family::kFaint, Family::kNeedle, Family::kZero}) {
    Case input({.family = family, .q_heads = 2, .kv_heads = 2, .sq = {1400}, .sk = {1500}});
    for (int block_size : {64, 128}) {
      for (int64_t most : {1, 129, 640}) {
        for (int64_t least : {0, 200, 700}) {
          SparsityPolicy policy = Policy(.6, block_size);
          policy.min_budget_tokens = least;
          policy.max_budget_tokens = most;
          SCOPED_TRACE(Describe(family, block_size, DType::kF32, .6) + " budgets " +
                       std::to_string(least) + " " + std::to_string(most));
          const Selected actual = Select(&input, policy);
          ExpectWellFormed(input, policy, actual);
          ExpectSame(actual, ReferenceSelect(&input, policy));
          const size_t limit = std::max<int64_t>(3, (most + block_size - 1) / block_size);
          for (const std::vector<int32_t>& row : actual.rows) EXPECT_LE(row.size(), limit);
        }
      }
    }
  }
}

TEST(Joint, MinimumBudgetExtendsRowsByTheirNearestBlocks) {
  Case input({.family = Family::kBand, .q_heads = 1, .kv_heads = 1, .sq = {2048}, .sk = {2048}});
  SparsityPolicy policy = Policy(.5);
  const Selected plain = Select(&input, policy);
  ASSERT_EQ(plain.rows[9], (std::vector<int32_t>{0, 8, 9}));
  policy.min_budget_tokens = 600;
  EXPECT_EQ(Select(&input, policy).rows[9], (std::vector<int32_t>{0, 6, 7, 8, 9}));
}

TEST(Joint, LastTwoBlocksOfQueriesReadEverything) {
  Case input({.family = Family::kBand, .sq = {2049}, .sk = {2049}});
  const Selected selected = Select(&input, Policy(.5));
  for (int h = 0; h < 4; ++h) {
    EXPECT_EQ(selected.rows[h * 17 + 16].size(), 17u);
    EXPECT_EQ(selected.rows[h * 17 + 15].size(), 16u);
    EXPECT_LT(selected.rows[h * 17 + 14].size(), 15u);
  }
}

// What a band of half a block's width needs, and no more: the first diagonals.
TEST(Joint, ABandNeedsOnlyItsDiagonals) {
  Case input({.family = Family::kBand,
              .q_heads = 1,
              .kv_heads = 1,
              .head_dim = 128,
              .sq = {4096},
              .sk = {4096},
              .band_delta = 70});
  for (float& x : input.q()) x *= 4;
  SparsityPolicy policy = Policy(.9);
  policy.measure_captured_mass = true;
  const Selected selected = Select(&input, policy);
  EXPECT_GT(selected.report[0].captured_mass, .98);
  EXPECT_EQ(selected.rows[20], (std::vector<int32_t>{0, 19, 20}));
}

TEST(Joint, CapturesGammaOnRowsItDidNotChooseFrom) {
  for (Family family : {Family::kSink, Family::kBand, Family::kNeedle, Family::kFaint}) {
    Case input({.family = family, .sq = {4000}, .sk = {4000}});
    for (double gamma : {.8, .9, .95}) {
      SparsityPolicy policy = Policy(gamma);
      policy.measure_captured_mass = true;
      const Selected selected = Select(&input, policy);
      double mean = 0;
      for (const HeadReport& head : selected.report) mean += head.captured_mass / 4;
      EXPECT_GE(mean, gamma - .02) << Describe(family, 4000, DType::kF32, gamma);
      EXPECT_LT(selected.report[0].density, 1);
    }
  }
}

TEST(Joint, PermutingHeadsPermutesRows) {
  Case input({.q_heads = 3, .kv_heads = 3, .sq = {1500}, .sk = {1500}});
  const Selected before = Select(&input, Policy(.7));
  for (std::vector<float>* x : {&input.q(), &input.k()}) {
    for (size_t t = 0; t < x->size(); t += 3 * 64) {
      std::rotate(x->begin() + t, x->begin() + t + 64, x->begin() + t + 3 * 64);
    }
  }
  const Selected after = Select(&input, Policy(.7));
  for (int h = 0; h < 3; ++h) {
    for (int row = 0; row < 12; ++row) {
      EXPECT_EQ(after.rows[h * 12 + row], before.rows[(h + 1) % 3 * 12 + row]);
    }
  }
}

TEST(Joint, RaggedSequencesAreThoseOfSeparateCalls) {
  Case both({.sq = {900, 1100}, .sk = {1000, 1100}});
  const Selected together = Select(&both, Policy(.7));
  const int64_t rows = 8 + 9, q_floats = 4 * 64, k_floats = 2 * 64;
  for (int s = 0; s < 2; ++s) {
    const int64_t sq = s == 0 ? 900 : 1100, sk = s == 0 ? 1000 : 1100;
    Case one({.sq = {sq}, .sk = {sk}});
    std::copy_n(both.q().begin() + s * 900 * q_floats, sq * q_floats, one.q().begin());
    std::copy_n(both.k().begin() + s * 1000 * k_floats, sk * k_floats, one.k().begin());
    const Selected alone = Select(&one, Policy(.7));
    const int64_t begin = s == 0 ? 0 : 8, count = s == 0 ? 8 : 9;
    for (int h = 0; h < 4; ++h) {
      for (int64_t row = 0; row < count; ++row) {
        EXPECT_EQ(together.rows[h * rows + begin + row], alone.rows[h * count + row]);
      }
      EXPECT_EQ(together.report[s * 4 + h].density, alone.report[h].density);
    }
  }
}

TEST(Joint, ThreadsDoNotChangeTheChoice) {
  Case input({.sq = {1900, 70}, .sk = {2000, 70}});
  SparsityPolicy policy = Policy(.8);
  policy.measure_captured_mass = true;
  const Selected one = Select(&input, policy, 1);
  for (int threads : {2, 3, 8}) {
    const Selected many = Select(&input, policy, threads);
    EXPECT_EQ(one.rows, many.rows);
    for (size_t h = 0; h < one.report.size(); ++h) {
      EXPECT_EQ(one.report[h].captured_mass, many.report[h].captured_mass);
    }
  }
}

TEST(Joint, LogitsTooLargeForF32DoNotLeaveTheBounds) {
  for (float bad : {NAN, INFINITY, -INFINITY, 3e38f}) {
    Case input({.q_heads = 2, .kv_heads = 1, .sq = {900}, .sk = {1000}});
    SparsityPolicy policy = Policy(.9);
    policy.max_budget_tokens = 512;
    policy.measure_captured_mass = true;
    for (size_t x = 0; x < input.k().size(); x += 977) input.k()[x] = bad;
    ExpectWellFormed(input, policy, Select(&input, policy));
    for (size_t x = 0; x < input.q().size(); x += 501) input.q()[x] = bad;
    const Selected selected = Select(&input, policy);
    ExpectWellFormed(input, policy, selected);
    for (const HeadReport& head : selected.report) {
      EXPECT_TRUE(head.captured_mass >= 0 && head.captured_mass <= 1);
    }
    ExpectWellFormed(input, policy, ReferenceSelect(&input, policy));
  }
}

}  // namespace
}  // namespace prefilld::cpu
