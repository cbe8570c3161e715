#include "server/kv/lease_table.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
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
  static LeaseInfo Grant(LeaseTable& table, std::shared_ptr<KvCache> cache,
                         absl::Duration ttl = absl::Hours(1),
                         std::function<void()> abandon = nullptr, const std::string& id = "a") {
    return table.Grant(id, {}, std::move(cache), ttl, std::move(abandon));
  }
  int64_t Free() { return pool_->CountByState()[0]; }

  const KvGeometry geometry_{
      .layers = 2, .kv_heads = 1, .head_dim = 64, .dtype = DType::kF32, .tokens = 10};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BlockPool> pool_;
};

TEST_F(LeaseTableTest, ANameIsRandomAndAGenerationRises) {
  LeaseTable table({});
  const auto first = Grant(table, NewCache()), second = Grant(table, NewCache());
  EXPECT_EQ(first.name.size(), 32u);
  EXPECT_NE(first.name, second.name) << "of one request_id";
  EXPECT_GT(second.generation, first.generation);
  EXPECT_TRUE(table.Find(first.name, first.generation).ok());
  for (const std::string& name : {std::string("a"), std::string(), first.name.substr(1),
                                  first.name + "0", std::string(32, 'g'), std::string(32, '0')}) {
    EXPECT_EQ(table.Find(name, first.generation).status().code(), absl::StatusCode::kNotFound);
    EXPECT_FALSE(table.OwnerOf(name));
  }
  table.ReleaseAll(LeaseEnd::kAbandoned);
  EXPECT_EQ(table.active(), 0);
}

TEST_F(LeaseTableTest, AnErrorTellsNeitherTheNameNorTheGeneration) {
  LeaseTable table({});
  const auto lease = Grant(table, NewCache());
  const absl::Status wrong = table.Find(lease.name, lease.generation + 1).status();
  EXPECT_EQ(wrong.code(), absl::StatusCode::kFailedPrecondition);
  const absl::Status unknown = table.Find(std::string(32, '0'), 7).status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kNotFound);
  for (const absl::Status& status : {wrong, unknown}) {
    const std::string text = status.ToString();
    EXPECT_EQ(text.find(lease.name), std::string::npos) << text;
    EXPECT_EQ(text.find(std::to_string(lease.generation)), std::string::npos) << text;
    EXPECT_EQ(text.find(std::string(32, '0')), std::string::npos) << text;
  }
}

TEST_F(LeaseTableTest, GenerationsOfTwoProcessesAreNotTheSame) {
  LeaseTable one({}), other({});
  const uint64_t first = Grant(one, NewCache()).generation,
                 second = Grant(other, NewCache()).generation;
  EXPECT_NE(first, second);
  EXPECT_GT(first, 0u);
  EXPECT_LT(first, uint64_t{1} << 53) << "a double has it";
}

TEST_F(LeaseTableTest, ReleaseFreesTheBlocksOnce) {
  LeaseTable table({});
  auto cache = NewCache();
  Complete(*cache);
  auto lease = Grant(table, std::move(cache), absl::Hours(1));
  EXPECT_EQ(Free(), 62);
  EXPECT_EQ(*table.Release(lease.name, lease.generation, LeaseEnd::kConsumed), 0);
  EXPECT_EQ(Free(), 64);
  EXPECT_EQ(table.Release(lease.name, lease.generation, LeaseEnd::kConsumed).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(LeaseTableTest, AnUnusedLeaseExpires) {
  absl::Notification ended;
  LeaseTable table({.ended = [&](const LeaseInfo& info, LeaseEnd why) {
    EXPECT_EQ(info.request_id, "a");
    EXPECT_EQ(why, LeaseEnd::kExpired);
    ended.Notify();
  }});
  auto cache = NewCache();
  Complete(*cache);
  Grant(table, std::move(cache), absl::Milliseconds(30), nullptr, "a");
  ASSERT_TRUE(ended.WaitForNotificationWithTimeout(absl::Seconds(10)));
  EXPECT_TRUE(table.WaitEmpty(SteadyNow() + absl::Seconds(10)));
  EXPECT_EQ(Free(), 64);
}

TEST_F(LeaseTableTest, ALeaseDoesNotAgeWhileItsCacheIsComputed) {
  absl::Notification ended;
  LeaseTable table({.ended = [&](const LeaseInfo&, LeaseEnd) { ended.Notify(); }});
  auto cache = NewCache();
  auto lease = Grant(table, cache, absl::Milliseconds(20));
  EXPECT_FALSE(ended.WaitForNotificationWithTimeout(absl::Milliseconds(200)));
  EXPECT_TRUE(table.Find(lease.name, lease.generation).ok());
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
  auto lease = Grant(table, cache, absl::Milliseconds(50), [&] { abandoned.Notify(); });
  table.SetFollowed(lease.name, lease.generation, false);
  table.SetFollowed(lease.name, lease.generation, true);
  EXPECT_FALSE(ended.WaitForNotificationWithTimeout(absl::Milliseconds(200)));
  table.SetFollowed(lease.name, lease.generation, false);
  auto pull = *cache->Open(nullptr);
  EXPECT_FALSE(ended.WaitForNotificationWithTimeout(absl::Milliseconds(200))) << "it is pulled";
  pull.reset();
  EXPECT_TRUE(ended.WaitForNotificationWithTimeout(absl::Seconds(10)));
  EXPECT_TRUE(abandoned.WaitForNotificationWithTimeout(absl::Seconds(10)));
}

TEST_F(LeaseTableTest, WhoRenewsALeaseWantsIt) {
  LeaseTable table({});
  auto lease = Grant(table, NewCache(), absl::Hours(1));
  EXPECT_FALSE(table.WasRenewed(lease.name, lease.generation));
  ASSERT_TRUE(table.Renew(lease.name, lease.generation, absl::ZeroDuration()).ok());
  EXPECT_TRUE(table.WasRenewed(lease.name, lease.generation));
  EXPECT_FALSE(table.WasRenewed(lease.name, lease.generation + 1));
  table.ReleaseAll(LeaseEnd::kAbandoned);
}

TEST_F(LeaseTableTest, AbandoningUnfinishedWorkStopsIt) {
  LeaseTable table({});
  bool abandoned = false;
  auto lease = Grant(table, NewCache(), absl::Hours(1), [&] { abandoned = true; });
  ASSERT_TRUE(table.Release(lease.name, lease.generation, LeaseEnd::kAbandoned).ok());
  EXPECT_TRUE(abandoned);
}

TEST_F(LeaseTableTest, AStalledPullIsCutOffAfterTheLeaseEnds) {
  absl::Notification aborted;
  LeaseTable table({}, /*stalled_reader_grace=*/absl::Milliseconds(10));
  auto cache = NewCache();
  Complete(*cache);
  auto transfer = *cache->Open([&] { aborted.Notify(); });
  auto lease = Grant(table, cache, absl::Milliseconds(30));
  EXPECT_EQ(*table.Release(lease.name, lease.generation, LeaseEnd::kConsumed), 1);
  EXPECT_EQ(Free(), 62) << "the pull still reads";
  ASSERT_TRUE(aborted.WaitForNotificationWithTimeout(absl::Seconds(10)));
  transfer.reset();
  EXPECT_EQ(Free(), 64);
}

TEST_F(LeaseTableTest, RenewalStartsTheTimeAnew) {
  LeaseTable table({});
  auto cache = NewCache();
  Complete(*cache);
  auto lease = Grant(table, cache, absl::Milliseconds(200));
  auto renewed = table.Renew(lease.name, lease.generation, absl::Hours(1));
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
  auto lease = Grant(table, passing, absl::Hours(1));
  Grant(table, retained, absl::Hours(1), nullptr, "retained");
  const SteadyTime deadline = SteadyNow() + absl::Seconds(30);
  while (table.Renew(lease.name, lease.generation, absl::Hours(1)).ok()) {
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
  Grant(table, cache, absl::ZeroDuration(), [&] {
    begun.Notify();
    go_on.WaitForNotification();
    abandoned = true;
  });
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
                          if (info.request_id == "first") first.Notify();
                          if (info.request_id == "second") second.Notify();
                        }},
                   /*stalled_reader_grace=*/absl::Minutes(10));
  auto kept = NewCache(), read = NewCache(), other = NewCache();
  for (const auto& cache : {kept, read, other}) Complete(*cache);
  auto lease = Grant(table, kept, absl::Minutes(10));
  auto ended = Grant(table, read, absl::Minutes(10));
  std::atomic<bool> aborted = false;
  auto transfer = *read->Open([&] { aborted = true; });
  EXPECT_EQ(*table.Release(ended.name, ended.generation, LeaseEnd::kConsumed), 1);
  const WallClockAhead ahead(3600);
  // The thread looks at everything to end these; it cuts pulls off behind that.
  Grant(table, other, absl::ZeroDuration(), nullptr, "first");
  first.WaitForNotification();
  Grant(table, other, absl::ZeroDuration(), nullptr, "second");
  second.WaitForNotification();
  EXPECT_TRUE(table.Find(lease.name, lease.generation).ok());
  EXPECT_FALSE(aborted);
}

// An end that was worked out by the wall's clock would lie an hour away.
TEST_F(LeaseTableTest, ALeaseExpiresInTimeWhateverTheWallsClockIsSetTo) {
  const WallClockAhead ahead(3600);
  absl::Notification ended;
  LeaseTable table({.ended = [&](const LeaseInfo&, LeaseEnd) { ended.Notify(); }});
  auto cache = NewCache();
  Complete(*cache);
  Grant(table, std::move(cache), absl::Milliseconds(30), nullptr, "a");
  ended.WaitForNotification();
  EXPECT_TRUE(table.WaitEmpty(SteadyNow() + absl::Seconds(20)));
  Grant(table, NewCache(), absl::Hours(1), nullptr, "b");
  EXPECT_FALSE(table.WaitEmpty(SteadyNow() + absl::Milliseconds(30)));
}

}  // namespace
}  // namespace prefilld
