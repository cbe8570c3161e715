#include "server/kv/lease_table.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "absl/synchronization/notification.h"

namespace {
std::atomic<int> wall_clock_set_by{0};  // seconds
}  // namespace

// The wall's clock of this program, which can be set.
extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
  const long result = syscall(SYS_clock_gettime, clock, time);
  if (clock == CLOCK_REALTIME) time->tv_sec += wall_clock_set_by;
  return static_cast<int>(result);
}

namespace prefilld {
namespace {

// Sets the wall's clock ahead while it lives.
class WallClockAhead {
 public:
  explicit WallClockAhead(int seconds) { Set(seconds); }
  ~WallClockAhead() { Set(0); }

 private:
  static void Set(int seconds) {
    wall_clock_set_by = seconds;
    const auto off = [] {
      return absl::Now() - absl::FromChrono(std::chrono::system_clock::now());
    };
    // absl asks the system every two seconds.
    while (absl::AbsDuration(off()) > absl::Minutes(1)) absl::SleepFor(absl::Milliseconds(1));
  }
};

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
  EXPECT_TRUE(table.WaitEmpty(SteadyNow() + absl::Seconds(10)));
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

TEST_F(LeaseTableTest, ALeaseThatNobodyFollowsAgesWhileItsCacheIsComputed) {
  absl::Notification ended, abandoned;
  LeaseTable table({.ended = [&](const LeaseInfo&, LeaseEnd why) {
    EXPECT_EQ(why, LeaseEnd::kExpired);
    ended.Notify();
  }});
  auto cache = NewCache();
  auto lease = *table.Grant("a", cache, absl::Milliseconds(50), [&] { abandoned.Notify(); });
  table.SetFollowed("a", lease.generation, false);
  table.SetFollowed("a", lease.generation, true);
  EXPECT_FALSE(ended.WaitForNotificationWithTimeout(absl::Milliseconds(200)));
  table.SetFollowed("a", lease.generation, false);
  auto pull = *cache->Open(nullptr);
  EXPECT_FALSE(ended.WaitForNotificationWithTimeout(absl::Milliseconds(200))) << "it is pulled";
  pull.reset();
  EXPECT_TRUE(ended.WaitForNotificationWithTimeout(absl::Seconds(10)));
  EXPECT_TRUE(abandoned.WaitForNotificationWithTimeout(absl::Seconds(10)));
}

TEST_F(LeaseTableTest, WhoRenewsALeaseWantsIt) {
  LeaseTable table({});
  auto lease = *table.Grant("a", NewCache(), absl::Hours(1), nullptr);
  EXPECT_FALSE(table.WasRenewed("a", lease.generation));
  ASSERT_TRUE(table.Renew("a", lease.generation, absl::ZeroDuration()).ok());
  EXPECT_TRUE(table.WasRenewed("a", lease.generation));
  EXPECT_FALSE(table.WasRenewed("a", lease.generation + 1));
  table.ReleaseAll(LeaseEnd::kAbandoned);
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
  EXPECT_FALSE(table.WaitEmpty(SteadyNow() + absl::Milliseconds(400)));
}

// It has memory that others could have; only a pull keeps it.
TEST_F(LeaseTableTest, WordsDoNotKeepWhatIsNotRetained) {
  LeaseTable table({}, /*stalled_reader_grace=*/absl::Milliseconds(50));
  auto passing = *KvCache::Create(*pool_, NewCache()->geometry(), /*retain=*/false);
  Complete(*passing);
  auto retained = NewCache();
  Complete(*retained);
  auto lease = *table.Grant("passing", passing, absl::Hours(1), nullptr);
  ASSERT_TRUE(table.Grant("retained", retained, absl::Hours(1), nullptr).ok());
  const SteadyTime deadline = SteadyNow() + absl::Seconds(30);
  while (table.Renew("passing", lease.generation, absl::Hours(1)).ok()) {
    ASSERT_LT(SteadyNow(), deadline);
    absl::SleepFor(absl::Milliseconds(5));
  }
  EXPECT_EQ(table.active(), 1);
}

// What a lease's end reaches into may go then.
TEST_F(LeaseTableTest, StoppingWaitsForALeaseThatEnds) {
  absl::Notification begun, go_on;
  std::atomic<bool> abandoned = false;
  LeaseTable table({});
  KvGeometry geometry = geometry_;
  geometry.layers = 3;
  auto cache = *KvCache::Create(*pool_, geometry, /*retain=*/false);
  for (int layer : {0, 1}) cache->Commit(layer);  // it waits for its consumer: a lease ages
  ASSERT_TRUE(table
                  .Grant("a", cache, absl::ZeroDuration(),
                         [&] {
                           begun.Notify();
                           go_on.WaitForNotification();
                           abandoned = true;
                         })
                  .ok());
  begun.WaitForNotification();
  std::thread other([&] { go_on.Notify(); });
  table.Stop();
  EXPECT_TRUE(abandoned);
  other.join();
  cache->Fail(absl::CancelledError("abandoned"));
}

// Neither a lease nor a pull ages by a clock that somebody sets.
TEST_F(LeaseTableTest, TheWallClockMayBeSet) {
  absl::Notification first, second;
  LeaseTable table({.ended =
                        [&](const LeaseInfo& info, LeaseEnd) {
                          if (info.name == "first") first.Notify();
                          if (info.name == "second") second.Notify();
                        }},
                   /*stalled_reader_grace=*/absl::Minutes(10));
  auto kept = NewCache(), read = NewCache(), other = NewCache();
  for (const auto& cache : {kept, read, other}) Complete(*cache);
  auto lease = *table.Grant("a", kept, absl::Minutes(10), nullptr);
  auto ended = *table.Grant("b", read, absl::Minutes(10), nullptr);
  std::atomic<bool> aborted = false;
  auto transfer = *read->Open([&] { aborted = true; });
  EXPECT_EQ(*table.Release("b", ended.generation, LeaseEnd::kConsumed), 1);
  const WallClockAhead ahead(3600);
  // The thread looks at everything to end these; it cuts pulls off behind that.
  ASSERT_TRUE(table.Grant("first", other, absl::ZeroDuration(), nullptr).ok());
  first.WaitForNotification();
  ASSERT_TRUE(table.Grant("second", other, absl::ZeroDuration(), nullptr).ok());
  second.WaitForNotification();
  EXPECT_TRUE(table.Find("a", lease.generation).ok());
  EXPECT_FALSE(aborted);
}

// An end that was worked out by the wall's clock would lie an hour away.
TEST_F(LeaseTableTest, ALeaseExpiresInTimeWhateverTheWallsClockIsSetTo) {
  const WallClockAhead ahead(3600);
  absl::Notification ended;
  LeaseTable table({.ended = [&](const LeaseInfo&, LeaseEnd) { ended.Notify(); }});
  auto cache = NewCache();
  Complete(*cache);
  ASSERT_TRUE(table.Grant("a", std::move(cache), absl::Milliseconds(30), nullptr).ok());
  ended.WaitForNotification();
  EXPECT_TRUE(table.WaitEmpty(SteadyNow() + absl::Seconds(20)));
  ASSERT_TRUE(table.Grant("b", NewCache(), absl::Hours(1), nullptr).ok());
  EXPECT_FALSE(table.WaitEmpty(SteadyNow() + absl::Milliseconds(30)));
}

}  // namespace
}  // namespace prefilld
