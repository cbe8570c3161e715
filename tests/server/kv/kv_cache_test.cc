#include "server/kv/kv_cache.h"

#include <gtest/gtest.h>

#include <cstring>

namespace prefilld {
namespace {

using PinOr = absl::StatusOr<std::shared_ptr<const KvCache::Pin>>;

class KvCacheTest : public testing::Test {
 protected:
  void SetUp() override {
    backend_ = *CreateBackend("cpu", 1);
    pool_ = *BlockPool::Create(backend_->device(), 64 * geometry_.block_bytes(),
                               geometry_.block_bytes());
  }
  std::array<int64_t, 4> Counts() { return pool_->CountByState(); }
  int64_t Free() { return Counts()[0]; }
  static PinOr Wait(KvCache& cache, int layer) {
    PinOr got = absl::UnknownError("not called");
    cache.WhenReady(layer, [&](PinOr pin) { got = std::move(pin); });
    return got;
  }

  const KvGeometry geometry_{
      .layers = 4, .kv_heads = 2, .head_dim = 64, .dtype = DType::kF32, .tokens = 300};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BlockPool> pool_;
};

TEST_F(KvCacheTest, RetainedCacheTakesEveryLayerAtOnce) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  EXPECT_EQ(Counts(), (std::array<int64_t, 4>{64 - 12, 12, 0, 0}));
  cache.reset();
  EXPECT_EQ(Free(), 64);
}

TEST_F(KvCacheTest, StreamedCacheTakesTwoLayersAndReusesThem) {
  auto cache = *KvCache::Create(*pool_, geometry_, false);
  EXPECT_EQ(Free(), 64 - 6);
  int freed = 0;
  cache->SetOnSlotFree([&] { ++freed; });
  cache->Commit(0);
  cache->Commit(1);
  EXPECT_FALSE(cache->CanCompute(2));
  EXPECT_FALSE(cache->computing()) << "it waits for its consumer";
  {
    auto pin = *Wait(*cache, 0);
    cache->Delivered(0);
    EXPECT_FALSE(cache->CanCompute(2)) << "the layer is still read";
    EXPECT_EQ(freed, 0);
  }
  EXPECT_EQ(freed, 1);
  EXPECT_TRUE(cache->CanCompute(2));
  EXPECT_FALSE(cache->CanCompute(3));
  EXPECT_EQ(Wait(*cache, 0).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(KvCacheTest, WaiterGetsTheLayerWhenItIsCommitted) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  std::byte* tile = cache->ComputeTile(1, 2, 1, true);
  std::memset(tile, 7, 16);
  int calls = 0;
  cache->WhenReady(1, [&](PinOr pin) {
    ++calls;
    ASSERT_TRUE(pin.ok());
    EXPECT_EQ((*pin)->tile(2, 1, true), tile);
    EXPECT_EQ(static_cast<int>(*(*pin)->tile(2, 1, true)), 7);
  });
  cache->Commit(0);
  EXPECT_EQ(calls, 0);
  cache->Commit(1);
  EXPECT_EQ(calls, 1);
}

TEST_F(KvCacheTest, FailureReachesWaitersAndKeepsCommittedLayers) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  cache->Commit(0);
  absl::Status seen;
  cache->WhenReady(1, [&](PinOr pin) { seen = pin.status(); });
  cache->Fail(absl::CancelledError("gone"));
  EXPECT_EQ(seen.code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(Wait(*cache, 0).ok());
  EXPECT_EQ(Wait(*cache, 3).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(KvCacheTest, ClosedCacheIsFreedOnlyWhenNobodyReadsOrWrites) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  auto transfer = *cache->Open([] {});
  cache->Commit(0);
  auto pin = *Wait(*cache, 0);
  EXPECT_EQ(Counts()[static_cast<int>(BlockState::kTransferring)], 3);
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_EQ(cache->Open([] {}).status().code(), absl::StatusCode::kFailedPrecondition);
  cache->Fail(absl::CancelledError("released"));
  EXPECT_EQ(Free(), 64 - 12);
  transfer.reset();
  EXPECT_EQ(Free(), 64 - 12) << "a slice still points into the blocks";
  pin.reset();
  EXPECT_EQ(Free(), 64);
  cache.reset();
  EXPECT_EQ(Free(), 64) << "given back twice";
}

TEST_F(KvCacheTest, ClosedCacheWaitsForTheEngine) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_EQ(Free(), 64 - 12) << "the engine may be writing";
  cache->Fail(absl::CancelledError("released"));
  EXPECT_EQ(Free(), 64);
}

TEST_F(KvCacheTest, OnlyStalledTransfersOfAClosedCacheAreAborted) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  int aborted = 0;
  auto stalled = *cache->Open([&] { ++aborted; });
  cache->AbortStalled(absl::Now());
  EXPECT_EQ(aborted, 0) << "it is not closed";
  cache->Close(absl::FailedPreconditionError("released"));
  const absl::Time before = absl::Now();
  stalled->Progress();
  cache->AbortStalled(before - absl::Milliseconds(1));
  EXPECT_EQ(aborted, 0) << "it made progress";
  cache->AbortStalled(absl::Now());
  cache->AbortStalled(absl::Now());
  EXPECT_EQ(aborted, 1);
}

TEST_F(KvCacheTest, TooLargeForTheRestOfThePoolTakesNothing) {
  auto taken = *pool_->Take(60);
  EXPECT_FALSE(KvCache::Create(*pool_, geometry_, true).ok());
  EXPECT_EQ(Free(), 4);
  pool_->GiveBack(taken, BlockState::kComputing);
}

}  // namespace
}  // namespace prefilld
