#include "server/transport/ipc_memory.h"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <fstream>
#include <set>
#include <string>

#include "server/transport/segment_pool.h"
#include "tests/server/fake_device.h"
#include "tests/server/importer.h"
#include "tests/server/memory_socket.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

constexpr auto kDevice = FakeDevice::Kind::kDevice;
constexpr uint64_t kMiB = uint64_t{1} << 20;

bool AllAre(const std::byte* data, uint64_t bytes, int value) {
  return std::all_of(data, data + bytes, [value](std::byte b) { return b == std::byte(value); });
}

class IpcMemoryTest : public testing::Test {
 protected:
  PeerFacts Ours() const {
    PeerFacts ours;
    medium_->Introduce(&ours);
    return ours;
  }
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes) {
    return medium_->Create(bytes, PeerAccess::kReadAndWrite);
  }
  std::shared_ptr<Region> Linked(uint64_t bytes) { return Region::Link(*Create(bytes)); }
  Importer Connect() const { return Importer(socket_.address()); }
  // That memory in use has so many bytes beyond the probe's.
  bool Holds(uint64_t bytes) {
    return Becomes([&] { return device_.live_bytes(kDevice) == FakeDevice::kSharedUnit + bytes; });
  }

  FakeDevice device_;
  MemorySocket socket_;
  std::unique_ptr<CudaIpc> medium_ = *CudaIpc::Open(device_, socket_.names);
};

TEST_F(IpcMemoryTest, IsTheSameMemoryInAnotherProcess) {
  const auto region = Linked(300'000);
  EXPECT_EQ(region->transport(), Transport::kCudaIpc);
  EXPECT_EQ(region->bytes(), 3 * FakeDevice::kSharedUnit) << "in whole units";
  EXPECT_EQ(medium_->Unit(), FakeDevice::kSharedUnit);
  EXPECT_EQ(region->address().device_uuid, "GPU-fake");
  EXPECT_TRUE(AllAre(region->data(), region->bytes(), 0));
  region->data()[5] = std::byte{5};
  const std::string socket = socket_.address(), name = region->address().name;
  const pid_t child = fork();
  if (child == 0) {
    Importer importer(socket);
    std::byte* const mapped = importer.Map(name);
    if (mapped == nullptr || mapped[5] != std::byte{5}) _exit(1);
    mapped[importer.bytes() - 1] = std::byte{6};
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(region->data()[region->bytes() - 1], std::byte{6});
}

TEST_F(IpcMemoryTest, NamesAreRandomAndNewForEachOwner) {
  std::set<std::string> names;
  for (int i = 0; i < 50; ++i) {
    const std::string name = Linked(1)->address().name;
    EXPECT_EQ(name.size(), 32u);
    EXPECT_TRUE(std::all_of(name.begin(), name.end(), [](unsigned char c) {
      return std::isxdigit(c);
    })) << name;
    names.insert(name);
  }
  EXPECT_EQ(names.size(), 50u);
}

TEST_F(IpcMemoryTest, NamesThatNeverWereAndThatAreNoMoreAreAnsweredAlike) {
  auto ended = Linked(1);
  const auto unlinked = Linked(1);
  const auto never_linked = *Create(1);
  const std::string old = ended->address().name;
  EXPECT_TRUE(Connect().Ask(old).any);
  ended.reset();
  unlinked->Unlink();
  EXPECT_EQ(never_linked->address().name, "");
  std::set<std::string> texts;
  for (const std::string& name : {old, unlinked->address().name, std::string(32, '0'),
                                  std::string("probe "), std::string(1000, 'x')}) {
    const auto answer = Connect().Ask(name);
    EXPECT_TRUE(answer.any && answer.bytes == 0 && answer.descriptor < 0) << name;
    texts.insert(answer.text);
  }
  EXPECT_EQ(texts.size(), 1u);
}

TEST_F(IpcMemoryTest, TheProbeIsForWhoeverAsks) {
  Importer importer = Connect();
  ASSERT_NE(importer.Map("probe"), nullptr);
  EXPECT_EQ(importer.bytes(), FakeDevice::kSharedUnit);
}

TEST_F(IpcMemoryTest, StaysAndCountsUntilItsPeersHaveHungUp) {
  bool counted = true;
  auto region = Linked(1);
  region->Keep({nullptr, [&](void*) {
                  counted = false;
                  EXPECT_TRUE(Holds(0)) << "the memory goes first";
                }});
  Importer importer = Connect();
  ASSERT_NE(importer.Map(region->address().name), nullptr);
  const std::string name = region->address().name;
  region.reset();
  EXPECT_EQ(Connect().Ask(name).bytes, 0u) << "nobody else has it from now on";
  EXPECT_TRUE(Holds(FakeDevice::kSharedUnit));
  EXPECT_TRUE(counted);
  importer.HangUp();
  EXPECT_TRUE(Holds(0));
  EXPECT_TRUE(Becomes([&] { return !counted; }));
}

TEST_F(IpcMemoryTest, MayOutliveItsMedium) {
  auto region = Linked(1);
  Importer importer = Connect();
  std::byte* const mapped = importer.Map(region->address().name);
  ASSERT_NE(mapped, nullptr);
  medium_.reset();
  socket_.socket.reset();
  EXPECT_FALSE(importer.Hear().any) << "it has hung up";
  region->data()[0] = std::byte{3};
  EXPECT_EQ(mapped[0], std::byte{3});
  region.reset();
  EXPECT_EQ(device_.live_bytes(kDevice), 0u);
}

TEST_F(IpcMemoryTest, AfterTheEndThereIsNoMore) {
  medium_->Close();
  EXPECT_EQ(Create(1).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(IpcMemoryTest, ReachesWhoIsOnThisHostAndSuchADevice) {
  PeerFacts peer = Ours();
  std::string host;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), host);
  EXPECT_EQ(peer.cuda_ipc_domain, host);
  EXPECT_EQ(peer.device_uuids, std::vector<std::string>{"GPU-fake"});
  peer.device_uuids = {"GPU-other", "GPU-fake"};
  EXPECT_TRUE(medium_->Reaches(peer).ok());
  peer.device_uuids.pop_back();
  EXPECT_FALSE(medium_->Reaches(peer).ok());
  peer = Ours();
  peer.device_uuids.clear();
  EXPECT_FALSE(medium_->Reaches(peer).ok());
  peer = Ours();
  peer.cuda_ipc_domain += "x";
  EXPECT_FALSE(medium_->Reaches(peer).ok());
}

TEST_F(IpcMemoryTest, NoRoomIsToldAtOnce) {
  device_.Limit(kDevice, device_.live_bytes(kDevice));
  EXPECT_EQ(Create(1).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(CudaIpc::Open(device_, socket_.names).status().code(), absl::StatusCode::kUnavailable);
}

// A pool in the device's memory.
class DevicePoolTest : public IpcMemoryTest {
 protected:
  ~DevicePoolTest() override {
    pool_->Stop();
    socket_.socket.reset();
    medium_.reset();
    pool_.reset();
    EXPECT_EQ(device_.live_bytes(kDevice), 0u);
  }
  uint64_t Count(SegmentState state) const {
    return pool_->CountByState()[static_cast<size_t>(state)];
  }
  bool Ready(uint64_t bytes) {
    return Becomes([&] { return Count(SegmentState::kReady) == bytes; });
  }
  std::shared_ptr<SegmentPool> pool_ = SegmentPool::Create(
      *medium_, device_, 64 * kMiB + 1000, [] { return true; }, absl::Hours(1));
};

TEST_F(DevicePoolTest, IsFilledAlthoughSomebodyComputesAndRegistersNothing) {
  EXPECT_EQ(pool_->bytes(), 64 * kMiB);
  pool_->Fill();
  EXPECT_TRUE(Ready(48 * kMiB));
  EXPECT_EQ(device_.registrations(), 0);
}

TEST_F(DevicePoolTest, SizesAreWholeUnits) {
  for (const uint64_t bytes : {uint64_t{1}, uint64_t{200'000}, 3 * kMiB + 1}) {
    const auto region = *pool_->Make(bytes);
    EXPECT_GE(region->bytes(), bytes);
    EXPECT_EQ(region->bytes() % FakeDevice::kSharedUnit, 0u);
    EXPECT_EQ(Count(SegmentState::kLent), region->bytes());
  }
}

TEST_F(DevicePoolTest, IsUsedAgainZeroedUnderANewNameOnceItsPeersHaveHungUp) {
  auto region = *pool_->Make(20 * kMiB);
  const int taken = device_.taken();
  const uint64_t bytes = region->bytes();
  std::set<std::string> names;
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(AllAre(region->data(), bytes, 0));
    const std::string name = region->address().name;
    names.insert(name);
    Importer importer = Connect(), late = Connect();
    std::byte* const mapped = importer.Map(name);
    ASSERT_NE(mapped, nullptr);
    std::memset(mapped, 7, bytes);
    region.reset();
    absl::SleepFor(absl::Milliseconds(20));
    EXPECT_EQ(Count(SegmentState::kLent), bytes) << "it is in use";
    EXPECT_EQ(pool_->Take(1), nullptr);
    EXPECT_TRUE(AllAre(mapped, bytes, 7)) << "and as it was";
    EXPECT_EQ(late.Ask(name).bytes, 0u) << "its name is gone";
    importer.HangUp();
    ASSERT_TRUE(Ready(bytes));
    EXPECT_EQ(device_.zeroed(), i + 1);
    region = pool_->Take(20 * kMiB);
    ASSERT_NE(region, nullptr);
  }
  EXPECT_EQ(names.size(), 3u);
  EXPECT_EQ(device_.taken(), taken) << "it is the same memory";
  region.reset();
  EXPECT_TRUE(Ready(bytes)) << "nobody was told of it";
}

TEST_F(DevicePoolTest, WhatCannotBeZeroedIsGivenBack) {
  auto region = *pool_->Make(20 * kMiB);
  device_.Lose();
  region.reset();
  EXPECT_TRUE(Holds(0));
  EXPECT_TRUE(pool_->WaitAllBack(SteadyNow() + absl::Seconds(10)));
  EXPECT_EQ(Count(SegmentState::kFree), 64 * kMiB);
}

TEST_F(DevicePoolTest, WhatPeersHoldIsNotThereForOthers) {
  auto region = *pool_->Make(64 * kMiB);
  Importer importer = Connect();
  ASSERT_NE(importer.Map(region->address().name), nullptr);
  region.reset();
  EXPECT_EQ(pool_->Make(1).status().code(), absl::StatusCode::kResourceExhausted);
  importer.HangUp();
  EXPECT_TRUE(Becomes([&] { return pool_->Make(1).ok(); }));
}

}  // namespace
}  // namespace prefilld
