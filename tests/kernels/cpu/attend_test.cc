// Stage 3 against the double-precision reference, on the same index.
#include "kernels/cpu/attend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

struct Sequence {
  int64_t queries, keys;
};

struct Problem {
  DType dtype = DType::kF32;
  int d = 64;
  int q_heads = 3;
  int kv_heads = 1;
  int block_size = 128;
  std::vector<Sequence> sequences;
  int keep_percent = 50;  // of the blocks before the diagonal; 100 is dense
  float amplitude = 1;
  int threads = 2;
};

// Owns everything that AttentionArgs points to. Rows have a margin that nobody may write.
class Call {
 public:
  static constexpr int64_t kMargin = 8;

  explicit Call(const Problem& problem) {
    args.shape = {problem.dtype, problem.q_heads, problem.kv_heads, problem.d, {0}, {0}};
    for (const Sequence& sequence : problem.sequences) {
      args.shape.cu_seqlens_q.push_back(args.shape.total_q() + sequence.queries);
      args.shape.cu_seqlens_k.push_back(args.shape.total_k() + sequence.keys);
    }
    args.policy.block_size = problem.block_size;
    args.softmax_scale = 1 / std::sqrt(problem.d);
    q_stride = problem.q_heads * problem.d + kMargin;
    const int64_t kv_stride = problem.kv_heads * problem.d + kMargin;
    args.q = {Fill(q, args.shape.total_q() * q_stride, problem), q_stride, problem.d};
    args.k = {Fill(k, args.shape.total_k() * kv_stride, problem), kv_stride, problem.d};
    args.v = {Fill(v, args.shape.total_k() * kv_stride, problem), kv_stride, problem.d};
    o.assign(q.size(), 0x5A);
    args.o = {o.data(), q_stride, problem.d};
    lse.assign(static_cast<size_t>(problem.q_heads * args.shape.total_q()), -1);
    args.lse = lse.data();
    FillIndex(problem);
  }

  float Output(int64_t token, int64_t h, int64_t c) const {
    return Widen(o.data(), args.shape.dtype, token * q_stride + h * args.shape.head_dim + c);
  }

  static float Widen(const void* data, DType dtype, int64_t at) {
    float wide;
    WidenRows(static_cast<const char*>(data) + at * static_cast<int64_t>(SizeOf(dtype)), dtype, 1,
              1, 1, 1, &wide, 1);
    return wide;
  }

  AttentionArgs args;
  int64_t q_stride;
  std::vector<uint8_t> q, k, v, o;
  std::vector<float> lse;

 private:
  const void* Fill(std::vector<uint8_t>& bytes, int64_t count, const Problem& problem) {
    std::normal_distribution<float> normal(0, problem.amplitude);
    bytes.resize(static_cast<size_t>(count) * SizeOf(problem.dtype));
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(random_);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (problem.dtype == DType::kF16) {  // of a normal number whose exponent fits
        const int exponent = std::clamp(static_cast<int>(bits >> 23 & 255) - 112, 1, 30);
        half = static_cast<uint16_t>((bits >> 16 & 0x8000) | static_cast<uint32_t>(exponent) << 10 |
                                     (bits >> 13 & 0x3FF));
      }
      if (problem.dtype == DType::kF32) {
        std::memcpy(&bytes[static_cast<size_t>(i) * 4], &value, 4);
      } else {
        std::memcpy(&bytes[static_cast<size_t>(i) * 2], &half, 2);
      }
    }
    return bytes.data();
  }

  void FillIndex(const Problem& problem) {
    const auto sequences = SplitIntoBlocks(args.shape, problem.block_size);
    const int64_t rows = TotalRows(sequences);
    const int64_t stride = MaxKeyBlocks(sequences) + 1;
    count_.resize(static_cast<size_t>(problem.q_heads * rows));
    index_.assign(static_cast<size_t>(problem.q_heads * rows * stride), 0xffff);
    args.index = {count_.data(), index_.data(), rows, stride};
    for (int h = 0; h < problem.q_heads; ++h) {
      for (const SequenceBlocks& sequence : sequences) {
        for (int64_t i = 0; i < sequence.q_blocks; ++i) {
          const int64_t row = sequence.row_begin + i;
          const int64_t diagonal = sequence.first_q_block + i;
          int32_t kept = 0;
          for (int64_t j = 0; j <= diagonal; ++j) {
            if (j == diagonal || static_cast<int>(random_() % 100) < problem.keep_percent) {
              args.index.row_at(h, row)[kept++] = static_cast<uint16_t>(j);
            }
          }
          args.index.count_at(h, row) = kept;
        }
      }
    }
  }

  std::mt19937 random_{20};
  std::vector<int32_t> count_;
  std::vector<uint16_t> index_;
};

// Runs the problem and compares all it wrote.
void ExpectMatchesReference(const Problem& problem) {
  SCOPED_TRACE(testing::Message() << Name(problem.dtype) << " d " << problem.d << " heads "
                                  << problem.q_heads << "/" << problem.kv_heads << " block "
                                  << problem.block_size << " first sequence "
                                  << problem.sequences[0].queries << "/"
                                  << problem.sequences[0].keys << " on " << InstructionSet());
  Call call(problem);
  const AttentionArgs& args = call.args;
  Attention attention(problem.threads);
  ASSERT_TRUE(attention.Run(args).ok());
  const ReferenceOutput expected = ReferenceAttend(args);

  double error = 0, norm = 0, worst = 0, worst_lse = 0;
  int64_t worst_token = 0, worst_head = 0;
  for (int64_t t = 0; t < args.shape.total_q(); ++t) {
    for (int64_t h = 0; h < problem.q_heads; ++h) {
      for (int64_t c = 0; c < problem.d; ++c) {
        const double want = expected.o[(t * problem.q_heads + h) * problem.d + c];
        const double off = std::abs(call.Output(t, h, c) - want);
        error += off * off;
        norm += want * want;
        if (!(off <= worst)) worst = off, worst_token = t, worst_head = h;
      }
      const int64_t at = h * args.shape.total_q() + t;
      worst_lse = std::max(worst_lse, std::abs(call.lse[at] - expected.lse[at]));
    }
    for (int64_t i = 0; i < Call::kMargin; ++i) {  // only its own elements are written
      const size_t at =
          (t * call.q_stride + problem.q_heads * problem.d + i) * SizeOf(args.shape.dtype);
      ASSERT_EQ(call.o[at], 0x5A) << "margin of token " << t;
    }
  }
  const double tolerance = problem.dtype == DType::kF32    ? 1e-5
                           : problem.dtype == DType::kBF16 ? 1e-2
                                                           : 1e-3;
  EXPECT_LE(std::sqrt(error / norm), tolerance)
      << "worst element off by " << worst << " at token " << worst_token << " head " << worst_head;
  EXPECT_LE(worst_lse, problem.dtype == DType::kF32 ? 1e-4 : 1e-3);
}

TEST(Attention, MatchesTheReferenceAtEveryLength) {
  for (int64_t tokens : {1, 2, 63, 64, 65, 127, 128, 129, 300, 1000}) {
    ExpectMatchesReference({.sequences = {{tokens, tokens}}});
    ExpectMatchesReference({.block_size = 64, .sequences = {{tokens, tokens}}});
  }
}

TEST(Attention, MatchesTheReferenceInEveryDTypeHeadDimAndBlockSize) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int d : {64, 96, 128, 256}) {
      for (int block_size : {64, 128}) {
        ExpectMatchesReference(
            {.dtype = dtype, .d = d, .block_size = block_size, .sequences = {{300, 300}}});
      }
    }
  }
}

TEST(Attention, AlignsQueriesAfterAPrefixToAbsolutePositions) {
  for (Sequence sequence :
       {Sequence{1, 2}, {1, 1000}, {128, 256}, {100, 300}, {172, 300}, {129, 514}, {200, 201}}) {
    ExpectMatchesReference({.sequences = {sequence}});
    ExpectMatchesReference({.block_size = 64, .sequences = {sequence}});
  }
}

TEST(Attention, KeepsRaggedSequencesApart) {
  ExpectMatchesReference({.q_heads = 6,
                          .kv_heads = 2,
                          .sequences = {{1, 1}, {300, 300}, {7, 200}, {128, 128}, {1, 129}}});
}

TEST(Attention, EveryCausalBlockIsDense) {
  ExpectMatchesReference({.sequences = {{700, 700}}, .keep_percent = 100});
  ExpectMatchesReference({.block_size = 64, .sequences = {{700, 700}}, .keep_percent = 100});
}

TEST(Attention, GroupsQueryHeadsOverTheirKvHead) {
  ExpectMatchesReference({.q_heads = 8, .kv_heads = 8, .sequences = {{200, 200}}});
  ExpectMatchesReference({.q_heads = 8, .kv_heads = 2, .sequences = {{200, 200}}});
}

TEST(Attention, StaysAccurateWithPeakedScores) {
  ExpectMatchesReference({.sequences = {{300, 300}}, .amplitude = 4});
}

TEST(Attention, RunsOneKvHeadAtATimeWhenTheyAreTooLargeTogether) {
  // 2 heads of 2 x 128 x 20096 floats are 41 MB: over the 32 MiB of one pass.
  ExpectMatchesReference({.dtype = DType::kBF16,
                          .d = 128,
                          .q_heads = 2,
                          .kv_heads = 2,
                          .sequences = {{5, 20000}},
                          .keep_percent = 20});
}

class AttentionOnTarget : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

TEST_P(AttentionOnTarget, MatchesTheReference) {
  ASSERT_STREQ(InstructionSet(), hwy::TargetName(GetParam()));
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    ExpectMatchesReference({.dtype = dtype, .d = 96, .sequences = {{150, 333}}});
  }
}

std::vector<int64_t> Targets() {
  std::vector<int64_t> targets;
  for (int64_t bits = hwy::SupportedTargets(); bits != 0; bits &= bits - 1) {
    const int64_t target = bits & -bits;
    hwy::SetSupportedTargetsForTest(target);
    // A target that was not generated falls back to another one.
    if (std::string(InstructionSet()) == hwy::TargetName(target)) targets.push_back(target);
  }
  hwy::SetSupportedTargetsForTest(0);
  return targets;
}

INSTANTIATE_TEST_SUITE_P(Every, AttentionOnTarget, testing::ValuesIn(Targets()),
                         [](const auto& target) { return hwy::TargetName(target.param); });

TEST(Attention, GivesTheSameBitsForAnyNumberOfThreads) {
  const Problem problem{.q_heads = 6, .kv_heads = 2, .sequences = {{400, 500}, {90, 90}}};
  Call one(problem), three(problem);
  ASSERT_TRUE(Attention(1).Run(one.args).ok());
  ASSERT_TRUE(Attention(3).Run(three.args).ok());
  EXPECT_EQ(one.o, three.o);
  EXPECT_EQ(one.lse, three.lse);
}

TEST(Attention, ReusesItsWorkspaceWithoutLeavingTraces) {
  Attention attention(2);
  Call large({.sequences = {{900, 900}}, .amplitude = 3});
  Call small({.sequences = {{130, 130}}}), again({.sequences = {{130, 130}}});
  ASSERT_TRUE(attention.Run(small.args).ok());
  ASSERT_TRUE(attention.Run(large.args).ok());
  ASSERT_TRUE(attention.Run(again.args).ok());
  EXPECT_EQ(small.o, again.o);
}

TEST(Attention, RowsWithoutBlocksAreZero) {
  Call call({.sequences = {{300, 300}}});
  call.args.index.count_at(1, 2) = 0;
  ASSERT_TRUE(Attention(2).Run(call.args).ok());
  for (int64_t t = 256; t < 300; ++t) {
    EXPECT_EQ(call.Output(t, 1, 0), 0);
    EXPECT_EQ(call.lse[300 + t], -std::numeric_limits<float>::infinity());
  }
  EXPECT_NE(call.Output(255, 1, 0), 0);
}

TEST(Attention, WritesNoLseWhenItIsNotAskedFor) {
  Call with({.sequences = {{130, 130}}}), without({.sequences = {{130, 130}}});
  without.args.lse = nullptr;
  ASSERT_TRUE(Attention(2).Run(with.args).ok());
  ASSERT_TRUE(Attention(2).Run(without.args).ok());
  EXPECT_EQ(with.o, without.o);
}

TEST(Attention, KeepsNonFiniteInputsFromEarlierBlocksAndOtherHeads) {
  for (float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const Problem problem{.q_heads = 2, .kv_heads = 2, .sequences = {{300, 300}}};
    Call clean(problem), dirty(problem);
    float* keys = reinterpret_cast<float*>(dirty.k.data());
    keys[200 * (2 * 64 + Call::kMargin)] = bad;  // token 200 of kv head 0
    ASSERT_TRUE(Attention(2).Run(clean.args).ok());
    ASSERT_TRUE(Attention(2).Run(dirty.args).ok());
    for (int64_t t = 0; t < 200; ++t) EXPECT_EQ(dirty.Output(t, 0, 5), clean.Output(t, 0, 5)) << t;
    for (int64_t t = 0; t < 300; ++t) EXPECT_EQ(dirty.Output(t, 1, 5), clean.Output(t, 1, 5)) << t;
    if (std::isnan(bad)) {
      for (int64_t t = 200; t < 256; ++t) EXPECT_TRUE(std::isnan(dirty.Output(t, 0, 5))) << t;
    }
  }
}

// Also within the blocks on the diagonal, where a value that a query must not see has probability
// 0.
TEST(Attention, KeepsNonFiniteValuesFromQueriesBeforeThem) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const int64_t token : {0, 1, 47, 48, 64, 200, 299}) {
      const Problem problem{
          .q_heads = 2, .kv_heads = 2, .sequences = {{300, 300}, {40, 50}}, .keep_percent = 100};
      Call clean(problem), dirty(problem);
      reinterpret_cast<float*>(dirty.v.data())[token * (2 * 64 + Call::kMargin) + 5] = bad;
      ASSERT_TRUE(Attention(2).Run(clean.args).ok());
      ASSERT_TRUE(Attention(2).Run(dirty.args).ok());
      for (int64_t t = 0; t < 340; ++t) {
        const bool sees = t >= token && t < 300;
        EXPECT_EQ(std::isfinite(dirty.Output(t, 0, 5)), !sees) << token << " " << t;
        if (!sees) {
          EXPECT_EQ(dirty.Output(t, 0, 5), clean.Output(t, 0, 5)) << token << " " << t;
        }
        EXPECT_EQ(dirty.Output(t, 0, 6), clean.Output(t, 0, 6)) << token << " " << t;
      }
    }
  }
}

}  // namespace
}  // namespace prefilld::cpu
