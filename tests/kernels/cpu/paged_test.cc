// K and V in pages through the stages: bit for bit what rows give.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/cpu/selection_case.h"

namespace prefilld::cpu {
namespace {

// What the stages wrote of one call.
struct Result {
  Selected selected;
  std::vector<char> o;
  std::vector<float> lse;
};

Result Run(Backend* backend, AttentionArgs args) {
  const int64_t row = int64_t{args.shape.q_heads} * args.shape.head_dim;
  Result result;
  result.o.resize(args.shape.total_q() * row * SizeOf(args.shape.dtype));
  result.lse.resize(args.shape.q_heads * args.shape.total_q());
  args.o = {result.o.data(), row, args.shape.head_dim};
  args.lse = result.lse.data();
  EXPECT_TRUE(backend->Supports(args.shape, args.policy).ok());
  for (auto stage : {&Backend::EstimatePattern, &Backend::SelectBlocks,
                     &Backend::MeasureCapturedMass, &Backend::Attend}) {
    const absl::Status status = (backend->*stage)(args, {});
    EXPECT_TRUE(status.ok()) << status;
  }
  result.selected = Copy(args);
  return result;
}

void ExpectSameBits(const Result& a, const Result& b) {
  EXPECT_EQ(a.selected.rows, b.selected.rows);
  ASSERT_EQ(a.selected.report.size(), b.selected.report.size());
  for (size_t x = 0; x < a.selected.report.size(); ++x) {
    const HeadReport &one = a.selected.report[x], &other = b.selected.report[x];
    EXPECT_EQ(one.pattern, other.pattern);
    EXPECT_EQ(one.dense_reason, other.dense_reason);
    EXPECT_EQ(one.density, other.density);
    EXPECT_EQ(one.captured_mass, other.captured_mass);
    EXPECT_EQ(one.captured_mass_min, other.captured_mass_min);
  }
  EXPECT_TRUE(a.o == b.o);
  ASSERT_EQ(a.lse.size(), b.lse.size());
  EXPECT_EQ(std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)), 0);
}

// K and V of a call in shuffled pages; pages of nobody and the tails of the last are NaN.
class Paged {
 public:
  Paged(const AttentionArgs& args, int page_tokens) {
    const AttentionShape& shape = args.shape;
    int64_t used = 0;
    for (int s = 0; s < shape.sequences(); ++s) {
      const int64_t sk = shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s];
      used += (sk + page_tokens - 1) / page_tokens;
    }
    pages_.resize(used + 3);
    std::iota(pages_.begin(), pages_.end(), 0);
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937(7));
    const int64_t row = shape.head_dim * static_cast<int64_t>(SizeOf(shape.dtype));
    // All ones is a NaN in every dtype.
    arena_.assign(pages_.size() * shape.kv_heads * 2 * page_tokens * row, '\xff');
    int64_t first = 0;
    for (int s = 0; s < shape.sequences(); ++s) {
      const int64_t begin = shape.cu_seqlens_k[s], sk = shape.cu_seqlens_k[s + 1] - begin;
      for (int64_t t = 0; t < sk; ++t) {
        for (int g = 0; g < shape.kv_heads; ++g) {
          for (int part = 0; part < 2; ++part) {
            const ConstHeadsView& from = part == 0 ? args.k : args.v;
            const int64_t at = (begin + t) * from.token_stride + g * from.head_stride;
            const int64_t page = pages_[first + t / page_tokens];
            const int64_t to =
                ((page * shape.kv_heads + g) * 2 + part) * page_tokens + t % page_tokens;
            std::memcpy(&arena_[to * row],
                        static_cast<const char*>(from.data) + at * SizeOf(shape.dtype), row);
          }
        }
      }
      first += (sk + page_tokens - 1) / page_tokens;
    }
    view_ = {arena_.data(), pages_.data(), static_cast<int64_t>(pages_.size()), page_tokens};
  }

  AttentionArgs Of(AttentionArgs args) const {
    args.k = args.v = {};
    args.kv_pages = view_;
    return args;
  }

 private:
  std::vector<int32_t> pages_;
  std::vector<char> arena_;
  KvPages view_;
};

void ExpectPagesGiveWhatRowsGive(DType dtype, std::vector<int64_t> sq, std::vector<int64_t> sk,
                                 bool prefix) {
  auto backend = *CreateBackend("cpu", 2);
  Case input({.dtype = dtype, .sq = std::move(sq), .sk = std::move(sk)});
  for (const MethodRow& method : kMethodTable) {
    if (prefix && method.needs_equal_lengths) continue;
    for (int block_size : {64, 128}) {
      const SparsityPolicy policy{.method = method.method, .gamma = 0.7, .block_size = block_size};
      const Result rows = Run(backend.get(), input.Args(policy));
      for (int page_tokens : {16, 64, 128, 256}) {
        SCOPED_TRACE(std::string(method.name) + " blocks of " + std::to_string(block_size) +
                     " pages of " + std::to_string(page_tokens));
        const AttentionArgs args = input.Args(policy);
        ExpectSameBits(Run(backend.get(), Paged(args, page_tokens).Of(args)), rows);
      }
    }
  }
}

TEST(PagedKv, GivesWhatRowsGive) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    ExpectPagesGiveWhatRowsGive(dtype, {700, 1, 300}, {700, 1, 300}, false);
  }
}

TEST(PagedKv, GivesWhatRowsGiveBehindAPrefix) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    ExpectPagesGiveWhatRowsGive(dtype, {200, 5, 300}, {700, 133, 301}, true);
  }
}

TEST(PagedKv, PagesThatAreNoneAreRefused) {
  auto backend = *CreateBackend("cpu", 1);
  Case input({.sq = {100}, .sk = {100}});
  const AttentionArgs rows = input.Args({.method = Method::kJoint});
  const Paged paged(rows, 64);
  const auto refused = [&](auto edit, const std::string& text) {
    AttentionArgs args = paged.Of(rows);
    edit(&args.kv_pages);
    for (auto stage : {&Backend::EstimatePattern, &Backend::SelectBlocks,
                       &Backend::MeasureCapturedMass, &Backend::Attend}) {
      const absl::Status status = (backend.get()->*stage)(args, {});
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
      EXPECT_THAT(std::string(status.message()), testing::HasSubstr(text));
    }
  };
  for (int tokens : {0, -16, 8, 48, 8192}) {
    refused([&](KvPages* pages) { pages->page_tokens = tokens; },
            "page_tokens " + std::to_string(tokens) + " is not a power of two from 16 to 4096");
  }
  refused([](KvPages* pages) { pages->pages = nullptr; }, "pages is null");
  refused([](KvPages* pages) { pages->arena_pages = 0; }, "arena_pages 0 is not positive");
  const int32_t beyond[] = {0, 5};
  refused([&](KvPages* pages) { pages->pages = beyond; }, "page 5 of sequence 0 is not one of 5");
}

}  // namespace
}  // namespace prefilld::cpu
