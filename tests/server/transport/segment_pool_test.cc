#include "server/transport/segment_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "server/record/errors.h"
#include "server/transport/shm_memory.h"
#include "tests/server/fake_device.h"
#include "tests/server/importer.h"
#include "tests/server/memory_socket.h"

namespace prefilld {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

bool Zeroed(const Region& region) {
  return std::all_of(region.data(), region.data() + region.bytes(),
                     [](std::byte b) { return b == std::byte{0}; });
}

// Shared memory with less of it, whose Create waits while a test holds the gate.
class SmallShm : public Medium {
 public:
  explicit SmallShm(Medium& shm) : shm_(shm) {}
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes, PeerAccess access) override {
    gate.Pass();
    ++created;
    if (bytes > largest) return absl::ResourceExhaustedError("no room");
    return shm_.Create(bytes, access);
  }
  void Introduce(PeerFacts*) const override {}
  absl::Status Reaches(const PeerFacts&) const override { return absl::OkStatus(); }
  void Close() override { shm_.Close(); }

  Gate gate;
  std::atomic<int> created{0};
  std::atomic<uint64_t> largest{1 << 30};

 private:
  Medium& shm_;
};

class SegmentPoolTest : public testing::Test {
 protected:
  ~SegmentPoolTest() override {
    pool_.reset();
    EXPECT_EQ(device_.registered(), 0);
  }
  uint64_t Count(SegmentState state) const {
    return pool_->CountByState()[static_cast<size_t>(state)];
  }
  // Until the background has made all that it will.
  void AwaitReady(uint64_t bytes) const {
    const absl::Time deadline = SteadyNow() + absl::Seconds(20);
    while (Count(SegmentState::kReady) != bytes && SteadyNow() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    ASSERT_EQ(Count(SegmentState::kReady), bytes);
  }

  std::shared_ptr<SegmentPool> CreatePool(uint64_t bytes) {
    return SegmentPool::Create(
        shm_, device_, bytes, [this] { return busy_.load(); }, kPatience);
  }

  static constexpr absl::Duration kPatience = absl::Milliseconds(300);
  std::atomic<bool> busy_{false};
  FakeDevice device_;
  MemorySocket socket_;
  std::unique_ptr<PosixShm> memory_ = *PosixShm::Open(socket_.names);
  SmallShm shm_{*memory_};
  std::shared_ptr<SegmentPool> pool_ = CreatePool(64 * kMiB);
};

TEST_F(SegmentPoolTest, IsReadyAndRegisteredBeforeAnybodyAsks) {
  EXPECT_EQ(pool_->Take(1), nullptr) << "it has not begun";
  EXPECT_EQ(shm_.created, 0);
  pool_->Fill();
  AwaitReady(48 * kMiB);
  EXPECT_EQ(device_.registrations(), 2);
  const auto small = pool_->Take(5 * kMiB), large = pool_->Take(17 * kMiB);
  ASSERT_TRUE(small && large);
  EXPECT_EQ(small->bytes(), 16 * kMiB);
  EXPECT_EQ(large->bytes(), 32 * kMiB);
  EXPECT_TRUE(Zeroed(*small));
  EXPECT_EQ(device_.registrations(), 2);
  EXPECT_EQ(Count(SegmentState::kLent), 48 * kMiB);
  EXPECT_EQ(Count(SegmentState::kFree), 16 * kMiB);
}

TEST_F(SegmentPoolTest, WhatWasLentIsZeroedAndLentAgainUnderAnotherName) {
  pool_->Fill();
  AwaitReady(48 * kMiB);
  const int registrations = device_.registrations();
  std::set<std::string> names;
  for (int i = 0; i < 3; ++i) {
    auto region = pool_->Take(20 * kMiB);
    ASSERT_NE(region, nullptr);
    names.insert(region->address().name);
    EXPECT_TRUE(Zeroed(*region));
    std::memset(region->data(), 7, region->bytes());
    region.reset();
    AwaitReady(48 * kMiB);
  }
  EXPECT_EQ(names.size(), 3u);
  EXPECT_EQ(device_.registrations(), registrations);
  EXPECT_EQ(shm_.created, 2);
}

TEST_F(SegmentPoolTest, WhatAPeerHasOpenStaysAsItIsUntilItHangsUp) {
  pool_->Fill();
  AwaitReady(48 * kMiB);
  auto region = pool_->Take(20 * kMiB);
  std::memset(region->data(), 7, region->bytes());
  Importer importer(socket_.address());
  const std::byte* const mapped = importer.Map(region->address().name, PROT_READ);
  ASSERT_NE(mapped, nullptr);
  region.reset();
  absl::SleepFor(absl::Milliseconds(20));
  EXPECT_EQ(Count(SegmentState::kLent), 32 * kMiB) << "it is in use";
  EXPECT_EQ(pool_->Take(20 * kMiB), nullptr);
  EXPECT_EQ(mapped[20 * kMiB], std::byte{7});
  importer.HangUp();
  AwaitReady(48 * kMiB);
  EXPECT_TRUE(Zeroed(*pool_->Take(20 * kMiB)));
}

TEST_F(SegmentPoolTest, WhoFindsItBeingZeroedWaitsForThat) {
  pool_ = CreatePool(512 * kMiB);
  auto first = *pool_->Make(256 * kMiB);
  for (int i = 0; i < 3; ++i) {
    first.reset();
    first = *pool_->Make(256 * kMiB);  // though there is room for another
    EXPECT_TRUE(Zeroed(*first));
    std::memset(first->data(), 7, first->bytes());
  }
  EXPECT_EQ(shm_.created, 1);
}

TEST_F(SegmentPoolTest, RegistersWhenNobodyComputes) {
  pool_ = CreatePool(32 * kMiB);
  busy_ = true;
  pool_->Fill();
  while (shm_.created == 0) absl::SleepFor(absl::Milliseconds(1));
  absl::SleepFor(kPatience / 3);
  EXPECT_EQ(device_.registrations(), 0);
  busy_ = false;
  AwaitReady(16 * kMiB);
  EXPECT_EQ(device_.registrations(), 1);
}

TEST_F(SegmentPoolTest, RegistersAtLastThoughSomebodyAlwaysComputes) {
  busy_ = true;
  pool_->Fill();
  AwaitReady(48 * kMiB);
}

TEST_F(SegmentPoolTest, WhoNeedsItWaitsForNobodyElse) {
  pool_ = SegmentPool::Create(
      shm_, device_, 64 * kMiB, [] { return true; }, absl::Hours(1));
  auto all = *pool_->Make(64 * kMiB);
  all.reset();
  EXPECT_TRUE(pool_->Make(64 * kMiB).ok());
}

TEST_F(SegmentPoolTest, FollowsWhatIsAskedFor) {
  pool_->Fill();
  AwaitReady(48 * kMiB);
  std::vector<std::shared_ptr<Region>> lent;
  for (int i = 0; i < 3; ++i) lent.push_back(*pool_->Make(16 * kMiB));
  EXPECT_EQ(Count(SegmentState::kLent), 64 * kMiB);
  lent.clear();
  AwaitReady(64 * kMiB);
  const int before = device_.registrations();
  for (int i = 0; i < 3; ++i) {
    lent.push_back(pool_->Take(16 * kMiB));
    ASSERT_NE(lent.back(), nullptr) << i;
  }
  EXPECT_EQ(device_.registrations(), before);
}

TEST_F(SegmentPoolTest, ASmallCacheLeavesALargeMemberToOthers) {
  pool_ = CreatePool(512 * kMiB);
  pool_->Fill();
  AwaitReady(496 * kMiB);
  std::vector<std::shared_ptr<Region>> lent;
  for (const uint64_t expected : {16 * kMiB, 32 * kMiB, 64 * kMiB}) {
    lent.push_back(pool_->Take(1));
    ASSERT_NE(lent.back(), nullptr);
    EXPECT_EQ(lent.back()->bytes(), expected);
  }
  EXPECT_EQ(pool_->Take(1), nullptr);
  EXPECT_EQ(pool_->Take(60 * kMiB)->bytes(), 128 * kMiB);
}

TEST_F(SegmentPoolTest, HoldsNoMoreThanItsBytes) {
  auto all = *pool_->Make(64 * kMiB);
  EXPECT_EQ(all->bytes(), 64 * kMiB);
  const absl::Status full = pool_->Make(1).status();
  EXPECT_EQ(FactsOf(full).reason, "kv_memory") << full;
  EXPECT_TRUE(FactsOf(full).retry_after);
  const absl::Status never = pool_->Make(64 * kMiB + 1).status();
  EXPECT_EQ(never.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(FactsOf(never).retry_after);
  all.reset();
  EXPECT_TRUE(pool_->Make(1).ok());
}

TEST_F(SegmentPoolTest, WhoFindsItBeingMadeWaitsForThat) {
  shm_.gate.Hold();
  pool_->Fill();
  shm_.gate.AwaitWaiter();  // the filler
  auto next = std::async(std::launch::async, [&] { return pool_->Make(60 * kMiB); });
  EXPECT_EQ(pool_->Take(30 * kMiB), nullptr) << "does not wait";
  shm_.gate.Release();
  const auto region = next.get();
  ASSERT_TRUE(region.ok()) << region.status();
  EXPECT_EQ((*region)->bytes(), 64 * kMiB);
}

TEST_F(SegmentPoolTest, MakesDoWithWhatThereIs) {
  shm_.largest = 16 * kMiB;
  pool_->Fill();
  AwaitReady(16 * kMiB);
  EXPECT_NE(pool_->Take(kMiB), nullptr);
  const absl::Status status = pool_->Make(20 * kMiB).status();
  EXPECT_EQ(status.message(), "no room");
  EXPECT_EQ(pool_->Make(10 * kMiB).status(), absl::OkStatus());
}

TEST_F(SegmentPoolTest, WhatIsLentMayOutliveIt) {
  pool_->Fill();
  AwaitReady(48 * kMiB);
  auto lent = pool_->Take(1);
  EXPECT_FALSE(pool_->WaitAllBack(SteadyNow()));
  pool_.reset();
  std::memset(lent->data(), 1, lent->bytes());
  lent.reset();
}

TEST_F(SegmentPoolTest, ManyAtOnce) {
  pool_->Fill();
  std::atomic<int> refused{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 15; ++i) {
        const uint64_t bytes = (1 + (i * 7 + t * 3) % 24) * kMiB;
        auto region = pool_->Take(bytes);
        if (region == nullptr) {
          auto made = pool_->Make(bytes);
          if (!made.ok() && ++refused) continue;
          region = *std::move(made);
        }
        ASSERT_GE(region->bytes(), bytes);
        ASSERT_EQ(region->data()[bytes - 1], std::byte{0});
        std::memset(region->data(), 1, bytes);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(refused, 40);
  EXPECT_TRUE(pool_->WaitAllBack(SteadyNow() + absl::Seconds(20)));
  EXPECT_EQ(Count(SegmentState::kLent), 0);
}

}  // namespace
}  // namespace prefilld
