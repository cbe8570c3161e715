// Stage 3 on the GPU, every kernel set, against the double-precision oracle on the same index.
#include "kernels/cuda/attend/attend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

constexpr int kBlockSizes[] = {64, 128};
constexpr int64_t kPrefixes[][2] = {{1, 2},     {1, 1000},  {128, 256}, {100, 300},
                                    {172, 300}, {129, 514}, {200, 201}};

struct KernelSet {
  const char* name;
  CudaCase::Attend attend;
  bool (*has)(DType dtype, int head_dim, int block_size);
  int oldest, newest;         // GPU: the major of its compute capability
  std::vector<DType> dtypes;  // where nothing is said, the first
  std::vector<int> head_dims;
  std::vector<float> amplitudes;  // of queries, whose scores are peaked
};
void PrintTo(const KernelSet& set, std::ostream* out) { *out << set.name; }
const std::vector<DType> k16Bit = {DType::kBF16, DType::kF16};
const std::vector<int> k16BitHeadDims = {64, 96, 128, 256};
const KernelSet kSets[] = {
    {"sm80", AttendSm80, HasAttendSm80, 8, 99, k16Bit, k16BitHeadDims, {4, 16}},
    {"sm90", AttendSm90, HasAttendSm90, 9, 9, k16Bit, k16BitHeadDims, {4, 16}},
    {"f32",
     AttendF32,
     HasAttendF32,
     8,
     99,
     {DType::kF32},
     {8, 16, 32, 64, 80, 96, 128, 192, 256},
     {4}}};

bool Runs(const KernelSet& set) {
  int major = 0;
  return HasDevice() &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
         major >= set.oldest && major <= set.newest;
}

class AttendOnGpu : public testing::TestWithParam<KernelSet> {
 protected:
  void SetUp() override {
    if (!Runs(GetParam())) GTEST_SKIP() << "no GPU for " << GetParam().name;
  }
  bool Has(const CaseOptions& options) const {
    return GetParam().has(options.dtype, options.head_dim, options.block_size);
  }
  // In the first dtype of the set.
  static CaseOptions Own(CaseOptions options) {
    options.dtype = GetParam().dtypes[0];
    return options;
  }
  // What a channel of o is held in.
  static int64_t OwnWords() { return Words(GetParam().dtypes[0]); }
  Output Run(CudaCase* input, int poison = 0xFF) { return input->Run(GetParam().attend, poison); }

  void ExpectMatches(const CaseOptions& options, int keep_percent = 50, int sampled = 0) {
    ExpectMatchesIn(GetParam().dtypes[0], options, keep_percent, sampled);
  }
  void ExpectMatchesIn(DType dtype, CaseOptions options, int keep_percent = 50, int sampled = 0) {
    options.dtype = dtype;
    if (!Has(options)) return;
    SCOPED_TRACE(Describe(options));
    CudaCase input(options);
    const CudaCase::Rows rows = input.RandomRows(keep_percent);
    input.SetIndex(rows);
    ExpectMatchesOracle(input, rows, Run(&input), sampled);
  }
};

INSTANTIATE_TEST_SUITE_P(Every, AttendOnGpu, testing::ValuesIn(kSets),
                         [](const auto& set) { return std::string(set.param.name); });

// Small enough for compute-sanitizer: every path once.
TEST_P(AttendOnGpu, Smoke) {
  for (int d : GetParam().head_dims) {
    ExpectMatches({.q_heads = 2, .kv_heads = 1, .head_dim = d, .sq = {300}});
  }
  ExpectMatches({.q_heads = 2, .kv_heads = 1, .block_size = 64, .sq = {200}});
  ExpectMatches({.q_heads = 2,
                 .kv_heads = 1,
                 .sq = {100, 1, 130},
                 .sk = {290, 1, 130},
                 .layout = Layout::kPaged});
}

TEST_P(AttendOnGpu, MatchesTheOracleAtEveryLength) {
  for (int64_t tokens : {1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 1000}) {
    for (int block_size : kBlockSizes) {
      ExpectMatches({.q_heads = 3, .kv_heads = 1, .block_size = block_size, .sq = {tokens}});
    }
  }
}

TEST_P(AttendOnGpu, MatchesTheOracleInEveryDTypeHeadDimAndBlockSize) {
  for (DType dtype : GetParam().dtypes) {
    for (int d : GetParam().head_dims) {
      for (int block_size : kBlockSizes) {
        for (Layout layout : {Layout::kTokens, Layout::kHeads, Layout::kPaged}) {
          ExpectMatchesIn(dtype, {.head_dim = d,
                                  .block_size = block_size,
                                  .sq = {450},
                                  .sk = {600},
                                  .layout = layout});
        }
      }
    }
  }
}

TEST_P(AttendOnGpu, AlignsQueriesAfterAPrefixToAbsolutePositions) {
  for (const auto& [sq, sk] : kPrefixes) {
    for (int block_size : kBlockSizes) {
      for (Layout layout : {Layout::kTokens, Layout::kPaged}) {
        for (int d : {64, 128}) {
          ExpectMatches(
              {.head_dim = d, .block_size = block_size, .sq = {sq}, .sk = {sk}, .layout = layout});
        }
      }
    }
  }
}

// Wherever a block lies in its page, the same bits as without pages.
TEST_P(AttendOnGpu, ReadsPagesLargerThanABlock) {
  for (int d : GetParam().head_dims) {
    for (const auto& [block_size, page_tokens] :
         {std::pair{64, 64}, {64, 128}, {64, 512}, {128, 128}, {128, 256}, {128, 1024}}) {
      CaseOptions options = Own({.q_heads = 6,
                                 .kv_heads = 2,
                                 .head_dim = d,
                                 .block_size = block_size,
                                 .sq = {1, 300, 7, 128, 1, 513},
                                 .sk = {1, 300, 1200, 128, 129, 1700}});
      if (!Has(options)) continue;
      CudaCase contiguous(options);
      options.layout = Layout::kPaged;
      options.page_tokens = page_tokens;
      SCOPED_TRACE(Describe(options));
      CudaCase paged(options);
      const CudaCase::Rows rows = contiguous.RandomRows(50);
      contiguous.SetIndex(rows);
      paged.SetIndex(rows);
      const Output output = Run(&paged);
      EXPECT_TRUE(Run(&contiguous) == output);
      ExpectMatchesOracle(paged, rows, output);
    }
  }
}

TEST_P(AttendOnGpu, KeepsRaggedSequencesApart) {
  for (const auto& [layout, page_tokens] : {std::pair(Layout::kTokens, 0),
                                            {Layout::kHeads, 0},
                                            {Layout::kPaged, 128},
                                            {Layout::kPaged, 256}}) {
    for (int d : {32, 64, 128}) {
      ExpectMatches({.q_heads = 6,
                     .kv_heads = 2,
                     .head_dim = d,
                     .sq = {1, 300, 7, 128, 1, 513},
                     .sk = {1, 300, 200, 128, 129, 700},
                     .layout = layout,
                     .page_tokens = page_tokens});
    }
  }
}

TEST_P(AttendOnGpu, GroupsQueryHeadsOverTheirKvHead) {
  for (const auto& [q_heads, kv_heads] :
       {std::pair{8, 8}, {8, 2}, {7, 1}, {1, 1}, {12, 4}, {9, 3}}) {
    for (int d : {64, 128}) {
      ExpectMatches({.q_heads = q_heads, .kv_heads = kv_heads, .head_dim = d, .sq = {260}});
    }
  }
}

TEST_P(AttendOnGpu, EveryCausalBlockIsDense) {
  for (int d : {64, 128}) ExpectMatches({.head_dim = d, .sq = {700}}, 100);
  ExpectMatches({.q_heads = 2, .kv_heads = 1, .head_dim = 64, .sq = {9000}}, 100, 4);
}

TEST_P(AttendOnGpu, StaysAccurateWithPeakedScores) {
  for (float amplitude : GetParam().amplitudes) {
    ExpectMatches({.sq = {600}, .amplitude = amplitude});
  }
}

TEST_P(AttendOnGpu, MatchesSampledRowsOfALongSequence) {
  for (int64_t tokens : {4097, 20000}) {
    for (int keep_percent : {3, 40, 100}) {
      ExpectMatches({.q_heads = 8, .kv_heads = 2, .sq = {tokens}}, keep_percent,
                    tokens > 10000 ? 1 : 4);
    }
  }
}

// An index is obeyed, whatever a method may choose: rows without their diagonal, without block 0,
// of one block, of none.
TEST_P(AttendOnGpu, ObeysAnyAscendingRows) {
  for (int block_size : kBlockSizes) {
    const CaseOptions options = Own({.block_size = block_size, .sq = {700}, .sk = {900}});
    if (!Has(options)) continue;
    CudaCase input(options);
    CudaCase::Rows rows = input.RandomRows(50, 3);
    for (size_t row = 0; row < rows.size(); ++row) {
      if (row % 4 == 1) rows[row].pop_back();
      if (row % 5 == 2) rows[row].erase(rows[row].begin());
      if (row % 7 == 3) rows[row].resize(std::min<size_t>(1, rows[row].size()));
    }
    for (std::vector<int32_t>& row : rows) {
      if (row.empty()) row = {0};
    }
    input.SetIndex(rows);
    ExpectMatchesOracle(input, rows, Run(&input));

    rows[1].clear();
    rows.back().clear();
    input.SetIndex(rows);
    const Output output = Run(&input);
    const auto expect_empty = [&](int64_t t, int64_t h) {
      EXPECT_EQ(output.lse[h * input.problem().total_q + t],
                -std::numeric_limits<float>::infinity());
      const int64_t words = options.head_dim * OwnWords();
      for (int64_t w = 0; w < words; ++w) {
        ASSERT_EQ(output.o[(t * options.q_heads + h) * words + w], 0)
            << "token " << t << " word " << w;
      }
    };
    const int64_t prefix = 200, first = (prefix / block_size + 1) * block_size - prefix;
    for (int64_t t = first; t < first + block_size; ++t) expect_empty(t, 0);
    for (int64_t t = (899 / block_size) * block_size - prefix; t < 700; ++t) expect_empty(t, 3);
  }
}

// And the rows behind it what is theirs.
TEST_P(AttendOnGpu, GivesARowWithoutABlockNothing) {
  for (int block_size : kBlockSizes) {
    const CaseOptions options =
        Own({.q_heads = 1, .kv_heads = 1, .block_size = block_size, .sq = {700}});
    if (!Has(options)) continue;
    CudaCase input(options);
    CudaCase::Rows rows = input.RandomRows(50);
    rows[1].clear();
    input.SetIndex(rows);
    const Output output = Run(&input);
    const int64_t words = options.head_dim * OwnWords();
    for (int64_t t = block_size; t < 2 * block_size; ++t) {
      EXPECT_EQ(output.lse[t], -std::numeric_limits<float>::infinity());
      for (int64_t w = t * words; w < (t + 1) * words; ++w) ASSERT_EQ(output.o[w], 0) << t;
    }
    EXPECT_GT(output.lse[2 * block_size], -100);
  }
}

TEST_P(AttendOnGpu, GivesTheSameBitsEveryTime) {
  CudaCase input(Own({.q_heads = 8, .kv_heads = 2, .sq = {3000, 1100}, .sk = {3000, 1500}}));
  input.SetIndex(input.RandomRows(30));
  const Output first = Run(&input);
  for (int poison : {0xFF, 0x00, 0x5A}) EXPECT_TRUE(first == Run(&input, poison)) << poison;
}

TEST_P(AttendOnGpu, WorksInAGraph) {
  CudaCase input(Own({.q_heads = 8, .kv_heads = 2, .sq = {1500, 700}, .sk = {1500, 1100}}));
  input.SetIndex(input.RandomRows(30));
  const Output expected = Run(&input);
  Graph graph([&](cudaStream_t stream) {
    EXPECT_CUDA_OK(
        GetParam().attend(input.problem(), input.attend_workspace(), Multiprocessors(), stream));
  });
  for (int replay = 0; replay < 3; ++replay) {
    input.PoisonOutput();
    graph.Replay();
    EXPECT_TRUE(expected == input.GetOutput()) << "replay " << replay;
  }
}

TEST_P(AttendOnGpu, NeedsNoLse) {
  CudaCase input(Own({.sq = {300}}));
  input.SetIndex(input.RandomRows(50));
  const Output expected = Run(&input);
  Problem problem = input.problem();
  problem.lse = nullptr;
  input.PoisonOutput();
  EXPECT_CUDA_OK(GetParam().attend(problem, input.attend_workspace(), Multiprocessors(), nullptr));
  EXPECT_CUDA_OK(cudaDeviceSynchronize());
  EXPECT_EQ(expected.o, input.GetOutput().o);
}

TEST_P(AttendOnGpu, PermutedHeadsGivePermutedOutput) {
  const CaseOptions options = Own({.q_heads = 4, .kv_heads = 1, .sq = {700}});
  const int64_t d = options.head_dim, words = d * OwnWords();
  CudaCase input(options);
  CudaCase permuted(options, [&](cpu::Case* wide) {
    std::vector<float> q = wide->q();
    for (int64_t t = 0; t < 700; ++t) {
      for (int64_t h = 0; h < 4; ++h) {
        std::copy_n(&q[(t * 4 + (h + 1) % 4) * d], d, &wide->q()[(t * 4 + h) * d]);
      }
    }
  });
  const CudaCase::Rows rows = input.RandomRows(40);
  CudaCase::Rows turned = rows;
  std::rotate(turned.begin(), turned.begin() + input.problem().rows, turned.end());
  input.SetIndex(rows);
  permuted.SetIndex(turned);
  const Output a = Run(&input), b = Run(&permuted);
  for (int64_t t = 0; t < 700; ++t) {
    for (int64_t h = 0; h < 4; ++h) {
      for (int64_t w = 0; w < words; ++w) {
        ASSERT_EQ(b.o[(t * 4 + h) * words + w], a.o[(t * 4 + (h + 1) % 4) * words + w])
            << "token " << t << " head " << h;
      }
    }
  }
}

TEST_P(AttendOnGpu, HandlesZeros) {
  ExpectMatches({.sq = {500}, .sk = {700}, .family = Family::kZero});
}

// Tasks in groups, so that those without a block come first, last and in between: they change
// nothing for the others.
TEST_P(AttendOnGpu, FindsItsWayAmongEmptyRows) {
  for (int d : {64, 128}) {
    const CaseOptions options = Own({.q_heads = 8,
                                     .kv_heads = 512 / d,
                                     .head_dim = d,
                                     .sq = {1500, 7, 100},
                                     .sk = {15000, 5000, 100}});
    if (!Has(options)) continue;
    SCOPED_TRACE(Describe(options));
    CudaCase input(options);
    const Problem& p = input.problem();
    CudaCase::Rows rows = input.RandomRows(10);
    input.SetIndex(rows);
    const Output all = Run(&input);
    std::mt19937 random(1);
    for (auto& row : rows) {
      if (random() % 2 == 0) row.clear();
    }
    input.SetIndex(rows);
    const Output some = Run(&input);
    for (int64_t at = 0; at < p.total_q * p.q_heads; ++at) {
      const int64_t token = at / p.q_heads, head = at % p.q_heads;
      const Sequence* s = p.host_sequence;
      while (token >= s->q_begin + s->sq) ++s;
      const int64_t block = (s->prefix + token - s->q_begin) / p.block_size;
      const bool empty = rows[head * p.rows + s->row_begin + block - s->first_q_block].empty();
      const float lse = all.lse[head * p.total_q + token];
      ASSERT_EQ(some.lse[head * p.total_q + token],
                empty ? -std::numeric_limits<float>::infinity() : lse)
          << "token " << token << " head " << head;
      const int64_t words = d * OwnWords();
      for (int64_t w = at * words; w < (at + 1) * words; ++w) {
        ASSERT_EQ(some.o[w], empty ? 0 : all.o[w]) << "token " << token << " head " << head;
      }
    }
  }
}

// What is not a number stays where it is visible: in its sequence, behind its position, within the
// rows that read its block.
TEST_P(AttendOnGpu, KeepsNaNToItself) {
  for (const float poison :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    // At the larger amplitude scores keep outgrowing what they were relative to.
    for (const auto& [layout, amplitude] :
         {std::pair(Layout::kTokens, 1.0f), {Layout::kTokens, 16.0f}, {Layout::kPaged, 1.0f}}) {
      const CaseOptions options = Own({.q_heads = 2,
                                       .kv_heads = 1,
                                       .sq = {200, 300, 250},
                                       .sk = {200, 400, 250},
                                       .layout = layout,
                                       .amplitude = amplitude});
      const int64_t d = options.head_dim, words = 2 * d * OwnWords();  // of a token
      CudaCase clean(options);
      CudaCase dirty(options, [&](cpu::Case* wide) {
        // All of the second sequence, and the last key of the third. Not its value: what is masked
        // has weight zero, and zero times infinity is NaN for the rows of that block.
        std::fill(&wide->q()[200 * 2 * d], &wide->q()[500 * 2 * d], poison);
        std::fill(&wide->k()[200 * d], &wide->k()[600 * d], poison);
        std::fill(&wide->v()[200 * d], &wide->v()[600 * d], poison);
        std::fill(&wide->k()[849 * d], &wide->k()[850 * d], poison);
      });
      const CudaCase::Rows rows = clean.RandomRows(60);
      clean.SetIndex(rows);
      dirty.SetIndex(rows);
      const Output a = Run(&clean), b = Run(&dirty);
      for (int64_t t = 0; t < 749; ++t) {
        if (t >= 200 && t < 500) continue;
        for (int64_t at = t * words; at < (t + 1) * words; ++at) {
          ASSERT_EQ(a.o[at], b.o[at]) << "token " << t << " poison " << poison;
        }
        for (int64_t h : {0, 1}) {
          ASSERT_EQ(a.lse[h * 750 + t], b.lse[h * 750 + t]) << "token " << t;
        }
      }
    }
  }
}

// NaN and infinities anywhere: no crash, no hang, nothing written but the output, and the next call
// is right.
TEST_P(AttendOnGpu, SurvivesAnyInput) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float poison : {std::numeric_limits<float>::quiet_NaN(), inf, -inf, 3e38f}) {
    for (int which : {0, 1, 2}) {
      CudaCase input(Own({.sq = {500}}), [&](cpu::Case* wide) {
        std::vector<float>& x = which == 0 ? wide->q() : which == 1 ? wide->k() : wide->v();
        for (size_t i = 0; i < x.size(); i += 1001) x[i] = poison;
      });
      input.SetIndex(input.RandomRows(50));
      Run(&input);
    }
  }
  ExpectMatches({.sq = {500}});
}

}  // namespace
}  // namespace prefilld::cuda
