#include "server/engine/prompt_limits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>

namespace prefilld {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

// 4 layers of blocks of 64 KiB, or, of the small model, 2 of 16 KiB.
const ModelInfo kLarge = {.name = "large",
                          .layers = 4,
                          .kv_heads = 2,
                          .head_dim = 64,
                          .max_positions = 4096,
                          .dtype = DType::kBF16};
const ModelInfo kSmall = {.name = "small",
                          .layers = 2,
                          .kv_heads = 1,
                          .head_dim = 32,
                          .max_positions = 512,
                          .dtype = DType::kBF16};

// 3 layers of blocks of 96 KiB.
const ModelInfo kOdd = {.name = "odd",
                        .layers = 3,
                        .kv_heads = 3,
                        .head_dim = 64,
                        .max_positions = 4096,
                        .dtype = DType::kBF16};

int64_t Holds(const ModelInfo& model, uint64_t bytes, bool pooled = false) {
  const KvShares shares = ShareKv({&kLarge, &kSmall}, bytes, pooled);
  return GeometryOf(model, 0).TokensInBlocks(shares.blocks, true);
}

TEST(KvShares, BlocksAreTheLargestModels) {
  const KvShares shares = ShareKv({&kSmall, &kLarge}, 10 * kMiB, /*pooled=*/false);
  EXPECT_EQ(shares.block_bytes, 64u << 10);
  EXPECT_EQ(shares.blocks, 160);
  EXPECT_FALSE(shares.segment_bytes.has_value());
  EXPECT_EQ(Holds(kLarge, 10 * kMiB), 40 * 128);
  EXPECT_EQ(Holds(kSmall, 10 * kMiB), 80 * 128);
}

TEST(KvShares, APoolOfSegmentsHasHalf) {
  const KvShares shares = ShareKv({&kLarge}, 10 * kMiB, /*pooled=*/true);
  EXPECT_EQ(shares.segment_bytes, 5 * kMiB);
  EXPECT_EQ(shares.blocks, 80);
}

// A cache of what blocks hold goes into the other half too.
TEST(KvShares, HalvesHoldTheSame) {
  for (uint64_t bytes = kMiB; bytes < 20 * kMiB; bytes += 100'000) {
    for (const ModelInfo* model : {&kLarge, &kOdd}) {
      const KvShares shares = ShareKv({model}, bytes, /*pooled=*/true);
      const int64_t tokens = GeometryOf(*model, 0).TokensInBlocks(shares.blocks, true);
      EXPECT_LE(tokens, GeometryOf(*model, 0).TokensInRegion(*shares.segment_bytes)) << bytes;
      EXPECT_LE(GeometryOf(*model, tokens).region_bytes(), shares.segment_bytes) << bytes;
    }
  }
}

uint64_t KvMemoryOf(const ModelInfos& models, int64_t tokens, bool pooled) {
  return KvMemoryFor(models, tokens, ShareKv(models, 0, pooled));
}

TEST(KvShares, TheMemoryThatIsNamedHoldsThePromptAndLessDoesNot) {
  for (const bool pooled : {false, true}) {
    for (const int64_t tokens : {1, 128, 129, 1000, 4096}) {
      const uint64_t bytes = KvMemoryOf({&kSmall, &kLarge}, tokens, pooled);
      EXPECT_GE(Holds(kLarge, bytes, pooled), tokens) << pooled;
      EXPECT_LT(Holds(kLarge, bytes - (128 << 10), pooled), tokens) << pooled;
      const int64_t blocks = ShareKv({&kOdd}, KvMemoryOf({&kOdd}, tokens, pooled), pooled).blocks;
      EXPECT_GE(GeometryOf(kOdd, 0).TokensInBlocks(blocks, true), tokens) << pooled;
    }
    EXPECT_EQ(KvMemoryOf({&kLarge}, 1 << 20, pooled), KvMemoryOf({&kLarge}, 4096, pooled))
        << "no prompt is longer than its model's positions";
  }
}

TEST(FlagSize, IsNeverLess) {
  EXPECT_EQ(FlagSize(1), "1KiB");
  EXPECT_EQ(FlagSize(1 << 20), "1MiB");
  EXPECT_EQ(FlagSize((1 << 20) + 1), "1025KiB");
  EXPECT_EQ(FlagSize(40 * kMiB + 1), "41MiB");
  EXPECT_EQ(FlagSize(uint64_t{32} << 30), "32GiB");
  EXPECT_EQ(FlagSize((uint64_t{32} << 30) + 1), "33GiB");
}

std::string Refusal(int64_t asked, uint64_t kv_bytes, const MemoryPlan& plan) {
  const ModelInfos models = {&kLarge, &kSmall};
  const absl::Status status = CheckPromptTokens({.asked = asked,
                                                 .models = models,
                                                 .kv = ShareKv(models, kv_bytes, /*pooled=*/false),
                                                 .plan = plan});
  return std::string(status.message());
}

MemoryPlan Fitting(int64_t asked, int64_t fits) {
  MemoryPlan plan{.prompt_tokens = asked, .fits = fits};
  plan.free = 1;
  return plan;
}

TEST(PromptTokens, WhatEveryLimitAllowsIsServed) {
  EXPECT_EQ(Refusal(4096, 8 * kMiB, Fitting(4096, 4096)), "");
  EXPECT_EQ(Refusal(1, 1 * kMiB, Fitting(1, 1)), "");
}

TEST(PromptTokens, EveryLimitIsNamedWithTheLargestNumberThatAllAllow) {
  using testing::HasSubstr;
  const std::string positions = Refusal(5000, 8 * kMiB, Fitting(5000, 5000));
  EXPECT_THAT(positions, HasSubstr("model: none has more than 4096 positions"));
  EXPECT_THAT(positions, HasSubstr("what helps: --max_prompt_tokens=4096"));
  EXPECT_THAT(positions, testing::Not(HasSubstr("kv_memory"))) << "enough for what the models take";
  const std::string kv = Refusal(4096, 4 * kMiB, Fitting(4096, 4096));
  EXPECT_THAT(kv, HasSubstr("one cache of model 'large' may hold 2048"));
  EXPECT_THAT(kv, HasSubstr("what helps: --max_prompt_tokens=2048, --kv_memory=8MiB"));
  const std::string gpu = Refusal(4096, 8 * kMiB, Fitting(4096, 777));
  EXPECT_THAT(gpu, HasSubstr("gpu memory: "));
  EXPECT_THAT(
      gpu, HasSubstr("--max_prompt_tokens=777, a smaller --attend_memory or "
                     "--kv_device_memory, a larger --gpu_memory where it is set, fewer --model"));
  const std::string all = Refusal(5000, 4 * kMiB, Fitting(5000, 3000));
  EXPECT_THAT(all, HasSubstr("5000 do not fit, at most 2048 do"));
  for (const char* what : {"4096 positions", "may hold 2048", "at most 3000 fit"}) {
    EXPECT_THAT(all, HasSubstr(what));
  }
}

// Of one of several models: what it needs, in blocks as large as the others'.
TEST(PromptTokens, AllThatBindOneModelIsTold) {
  const MemoryPlan plan = Fitting(4096, 300);
  const auto bounds = BoundsOf({.asked = kSmall.max_positions,
                                .models = {&kSmall},
                                .kv = ShareKv({&kLarge, &kSmall}, 256 << 10, /*pooled=*/false),
                                .plan = plan});
  ASSERT_EQ(bounds.size(), 2u);
  EXPECT_EQ(bounds[0].what, "kv_memory");
  EXPECT_EQ(bounds[0].tokens, 256);
  EXPECT_EQ(bounds[0].help, "--kv_memory=512KiB");
  EXPECT_EQ(bounds[1].what, "gpu memory");
  EXPECT_EQ(bounds[1].tokens, 300);
  const MemoryPlan enough = Fitting(4096, 600);
  EXPECT_TRUE(BoundsOf({.asked = kSmall.max_positions,
                        .models = {&kSmall},
                        .kv = ShareKv({&kLarge, &kSmall}, kMiB, /*pooled=*/false),
                        .plan = enough})
                  .empty())
      << "of more than this model takes";
}

TEST(PromptTokens, WhereNoPromptFitsNoNumberHelps) {
  const std::string refusal = Refusal(4096, 8 * kMiB, Fitting(4096, 0));
  EXPECT_THAT(refusal, testing::HasSubstr("no prompt fits; what helps: a smaller --attend_memory"));
}

}  // namespace
}  // namespace prefilld
