#include "server/kv/block_pool.h"

#include <gtest/gtest.h>

#include "server/record/errors.h"

namespace prefilld {
namespace {

class BlockPoolTest : public testing::Test {
 protected:
  void SetUp() override {
    backend_ = *CreateBackend("cpu", 1);
    pool_ = *BlockPool::Create(backend_->device(), 10 * 4096 + 100, 4096);
  }
  int64_t Count(BlockState state) { return pool_->CountByState()[static_cast<int>(state)]; }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BlockPool> pool_;
};

TEST_F(BlockPoolTest, HoldsWholeBlocksOnly) {
  EXPECT_EQ(pool_->total(), 10);
  EXPECT_EQ(Count(BlockState::kFree), 10);
}

TEST_F(BlockPoolTest, TakesAllOrNothing) {
  auto first = pool_->Take(7);
  ASSERT_TRUE(first.ok());
  auto second = pool_->Take(4);
  ASSERT_EQ(second.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(FactsOf(second.status()).retry_after.has_value());
  EXPECT_EQ(Count(BlockState::kFree), 3);
  EXPECT_EQ(Count(BlockState::kComputing), 7);
}

TEST_F(BlockPoolTest, WhatNeverFitsIsRefusedWithoutARetry) {
  auto refused = pool_->Take(11);
  ASSERT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(FactsOf(refused.status()).retry_after.has_value());
}

TEST_F(BlockPoolTest, BlocksAreDistinctAndComeBack) {
  auto blocks = *pool_->Take(10);
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(pool_->data(blocks[i]), pool_->data(blocks[j]));
  }
  pool_->GiveBack(blocks, BlockState::kComputing);
  EXPECT_EQ(Count(BlockState::kFree), 10);
  EXPECT_TRUE(pool_->Take(10).ok());
}

TEST_F(BlockPoolTest, NoBlockAtAllIsAnError) {
  EXPECT_FALSE(BlockPool::Create(backend_->device(), 100, 4096).ok());
}

}  // namespace
}  // namespace prefilld
