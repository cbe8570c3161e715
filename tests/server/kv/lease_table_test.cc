#include "server/kv/lease_table.h"

#include <gtest/gtest.h>

#include "absl/synchronization/notification.h"

namespace prefilld {
namespace {

class LeaseTableTest : public testing::Test {
 protected:
  void SetUp() override {
    backend_ = *CreateBackend("cpu", 1);
    pool_ = *BlockPool::Create(backend_->device(), 64 * geometry_.block_bytes(),
                               geometry_.block_bytes());
  }
  std::shared_ptr<KvCache> NewCache() { return *KvCache::Create(*pool_, geometry_, true); }
  static void Complete(KvCache& cache) {
    for (int layer = 0; layer < cache.geometry().layers; ++layer) cache.Commit(layer);
  }
  int64_t Free() { return pool_->CountByState()[0]; }

  const KvGeometry geometry_{
      .layers = 2, .kv_heads = 1, .head_dim = 64, .dtype = DType::kF32, .tokens = 10};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BlockPool> pool_;
};

TEST_F(LeaseTableTest, GenerationRisesWhenANameReturns) {
  LeaseTable table({});
  auto cache = NewCache();
  Complete(*cache);
  auto first = *table.Grant("a", cache, absl::Hours(1), nullptr);
  EXPECT_EQ(table.Grant("a", cache, absl::Hours(1), nullptr).status().code(),
            absl::StatusCode::kAlreadyExists);
  ASSERT_TRUE(table.Release("a", first.generation, LeaseEnd::kConsumed).ok());
  auto second = *table.Grant("a", NewCache(), absl::Hours(1), nullptr);
  EXPECT_GT(second.generation, first.generation);
  EXPECT_EQ(table.Find("a", first.generation).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(table.Find("b", 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(table.Find("a", second.generation).ok());
  table.ReleaseAll(LeaseEnd::kAbandoned);
  EXPECT_EQ(table.active(), 0);
}

TEST_F(LeaseTableTest, ReleaseFreesTheBlocksOnce) {
  LeaseTable table({});
  auto cache = NewCache();
  Complete(*cache);
  auto lease = *table.Grant("a", std::move(cache), absl::Hours(1), nullptr);
  EXPECT_EQ(Free(), 62);
  EXPECT_EQ(*table.Release("a", lease.generation, LeaseEnd::kConsumed), 0);
  EXPECT_EQ(Free(), 64);
  EXPECT_EQ(table.Release("a", lease.generation, LeaseEnd::kConsumed).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(LeaseTableTest, AnUnusedLeaseExpires) {
  absl::Notification ended;
  LeaseTable table({.ended = [&](const LeaseInfo& info, LeaseEnd why) {
    EXPECT_EQ(info.name, "a");
    EXPECT_EQ(why, LeaseEnd::kExpired);
    ended.Notify();
  }});
  auto cache = NewCache();
  Complete(*cache);
  ASSERT_TRUE(table.Grant("a", std::move(cache), absl::Milliseconds(30), nullptr).ok());
  ASSERT_TRUE(ended.WaitForNotificationWithTimeout(absl::Seconds(10)));
  EXPECT_TRUE(table.WaitEmpty(absl::Now() + absl::Seconds(10)));
  EXPECT_EQ(Free(), 64);
}

TEST_F(LeaseTableTest, ALeaseDoesNotAgeWhileItsCacheIsComputed) {
  absl::Notification ended;
  LeaseTable table({.ended = [&](const LeaseInfo&, LeaseEnd) { ended.Notify(); }});
  auto cache = NewCache();
  auto lease = *table.Grant("a", cache, absl::Milliseconds(20), nullptr);
  EXPECT_FALSE(ended.WaitForNotificationWithTimeout(absl::Milliseconds(200)));
  EXPECT_TRUE(table.Find("a", lease.generation).ok());
  Complete(*cache);
  EXPECT_TRUE(ended.WaitForNotificationWithTimeout(absl::Seconds(10)));
}

TEST_F(LeaseTableTest, AbandoningUnfinishedWorkStopsIt) {
  LeaseTable table({});
  bool abandoned = false;
  auto lease = *table.Grant("a", NewCache(), absl::Hours(1), [&] { abandoned = true; });
  ASSERT_TRUE(table.Release("a", lease.generation, LeaseEnd::kAbandoned).ok());
  EXPECT_TRUE(abandoned);
}

TEST_F(LeaseTableTest, AStalledPullIsCutOffAfterTheLeaseEnds) {
  absl::Notification aborted;
  LeaseTable table({}, /*stalled_reader_grace=*/absl::Milliseconds(10));
  auto cache = NewCache();
  Complete(*cache);
  auto transfer = *cache->Open([&] { aborted.Notify(); });
  auto lease = *table.Grant("a", cache, absl::Milliseconds(30), nullptr);
  EXPECT_EQ(*table.Release("a", lease.generation, LeaseEnd::kConsumed), 1);
  EXPECT_EQ(Free(), 62) << "the pull still reads";
  ASSERT_TRUE(aborted.WaitForNotificationWithTimeout(absl::Seconds(10)));
  transfer.reset();
  EXPECT_EQ(Free(), 64);
}

TEST_F(LeaseTableTest, RenewalStartsTheTimeAnew) {
  LeaseTable table({});
  auto cache = NewCache();
  Complete(*cache);
  auto lease = *table.Grant("a", cache, absl::Milliseconds(200), nullptr);
  auto renewed = table.Renew("a", lease.generation, absl::Hours(1));
  ASSERT_TRUE(renewed.ok());
  EXPECT_EQ(renewed->ttl, absl::Hours(1));
  EXPECT_FALSE(table.WaitEmpty(absl::Now() + absl::Milliseconds(400)));
}

}  // namespace
}  // namespace prefilld
