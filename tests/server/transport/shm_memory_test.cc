#include "server/transport/shm_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/machine_memory.h"
#include "server/record/errors.h"
#include "tests/server/importer.h"
#include "tests/server/memory_socket.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

constexpr uint64_t kBytes = 10'000;

class ShmMemoryTest : public testing::Test {
 protected:
  std::shared_ptr<Region> Linked(PeerAccess access = PeerAccess::kRead, uint64_t bytes = kBytes) {
    return Region::Link(*shm_->Create(bytes, access));
  }
  Importer Connect() const { return Importer(socket_.address()); }
  // Beside the probe.
  bool Live(int segments) {
    return Becomes([&] { return segments_.used() == 1 + segments; });
  }

  DescriptorShare segments_{4};
  MemorySocket socket_;
  std::unique_ptr<PosixShm> shm_ = *PosixShm::Open(socket_.names, segments_);
};

TEST_F(ShmMemoryTest, TheDomainIsTheKernelsBootInAFormThatNamesTheWay) {
  PeerFacts ours;
  shm_->Introduce(&ours);
  std::string boot;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot);
  EXPECT_EQ(ours.shm_domain, "memfd:" + boot);
  EXPECT_TRUE(shm_->Reaches(ours).ok());
  for (const std::string& other : {std::string(), boot, boot + ":26", "memfd:" + boot + "0"}) {
    const absl::Status status = shm_->Reaches({.shm_domain = other});
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << other;
  }
}

TEST_F(ShmMemoryTest, IsZeroedAndTheSameInAnotherProcess) {
  const auto region = Linked();
  ASSERT_EQ(region->bytes(), kBytes);
  EXPECT_TRUE(std::all_of(region->data(), region->data() + kBytes,
                          [](std::byte b) { return b == std::byte{0}; }));
  region->data()[9'999] = std::byte{7};
  const pid_t child = fork();
  if (child == 0) {
    Importer importer = Connect();
    const std::byte* const mapped = importer.Map(region->address().name, PROT_READ);
    _exit(mapped != nullptr && importer.bytes() == kBytes && mapped[9'999] == std::byte{7} ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST_F(ShmMemoryTest, ItsMemoryIsTakenNotPromised) {
  const auto region = Linked();
  const int fd = *region->Descriptor();
  struct stat info;
  ASSERT_EQ(fstat(fd, &info), 0);
  EXPECT_EQ(info.st_size, kBytes);
  EXPECT_GE(info.st_blocks * 512, kBytes);
  EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  close(fd);
}

// A page that is taken away under those who have it mapped would end them.
TEST_F(ShmMemoryTest, NobodyCanTruncateIt) {
  for (const PeerAccess access : {PeerAccess::kRead, PeerAccess::kReadAndWrite}) {
    const auto region = Linked(access);
    const int fd = *region->Descriptor();
    const std::string path = absl::StrCat("/proc/self/fd/", fd);
    const int again = open(path.c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(again, 0);
    for (const int file : {fd, again}) {
      for (const off_t size : {0, 1, 4096, 9'999, 10'001, 1 << 20}) {
        EXPECT_NE(ftruncate(file, size), 0) << size;
        EXPECT_EQ(errno, EPERM) << size;
      }
      EXPECT_NE(posix_fallocate(file, 0, 1 << 20), 0) << "nor make it grow";
      EXPECT_NE(fcntl(file, F_ADD_SEALS, F_SEAL_WRITE), 0) << "nor seal it further";
    }
    EXPECT_NE(truncate(path.c_str(), 0), 0);
    EXPECT_LT(open(path.c_str(), O_RDWR | O_TRUNC), 0);
    std::memset(region->data(), 1, kBytes);
    close(again);
    close(fd);
  }
}

TEST_F(ShmMemoryTest, OnlyWeWriteWhatPeersAreToRead) {
  const auto region = Linked(PeerAccess::kRead);
  Importer importer = Connect();
  EXPECT_EQ(importer.Map(region->address().name), nullptr) << "not to be written";
  Importer reader = Connect();
  std::byte* const mapped = reader.Map(region->address().name, PROT_READ);
  ASSERT_NE(mapped, nullptr);
  EXPECT_NE(mprotect(mapped, kBytes, PROT_READ | PROT_WRITE), 0);
  const int fd = *region->Descriptor();
  EXPECT_LT(pwrite(fd, "x", 1, 0), 0);
  EXPECT_NE(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
  close(fd);
  region->data()[5] = std::byte{5};
  EXPECT_EQ(mapped[5], std::byte{5});
}

TEST_F(ShmMemoryTest, PeersMayWriteWhatIsForThat) {
  const auto region = Linked(PeerAccess::kReadAndWrite);
  Importer importer = Connect();
  std::byte* const mapped = importer.Map(region->address().name);
  ASSERT_NE(mapped, nullptr);
  mapped[9] = std::byte{9};
  EXPECT_EQ(region->data()[9], std::byte{9});
}

TEST_F(ShmMemoryTest, StaysAndCountsUntilItsPeersHaveHungUp) {
  bool counted = true;
  auto region = Linked();
  region->Keep({nullptr, [&](void*) { counted = false; }});
  region->data()[3] = std::byte{3};
  Importer importer = Connect();
  const std::byte* const mapped = importer.Map(region->address().name, PROT_READ);
  ASSERT_NE(mapped, nullptr);
  const std::string name = region->address().name;
  region.reset();
  EXPECT_EQ(Connect().Ask(name).bytes, 0u) << "nobody else has it from now on";
  EXPECT_EQ(mapped[3], std::byte{3}) << "who has it keeps it";
  EXPECT_TRUE(Live(1));
  EXPECT_TRUE(counted);
  importer.HangUp();
  EXPECT_TRUE(Live(0));
  EXPECT_TRUE(Becomes([&] { return !counted; }));
}

TEST_F(ShmMemoryTest, APeerThatIsKilledHasHungUp) {
  auto region = Linked();
  int mapped[2];
  ASSERT_EQ(pipe(mapped), 0);
  const pid_t child = fork();
  if (child == 0) {
    Importer importer = Connect();
    (void)importer.Map(region->address().name, PROT_READ);
    (void)!write(mapped[1], "x", 1);
    for (;;) pause();
  }
  char said;
  ASSERT_EQ(read(mapped[0], &said, 1), 1);
  region.reset();
  EXPECT_TRUE(Live(1));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(Live(0));
  close(mapped[0]);
  close(mapped[1]);
}

TEST_F(ShmMemoryTest, TheProbeIsForWhoeverAsks) {
  Importer importer = Connect();
  EXPECT_NE(importer.Map("probe_shm", PROT_READ), nullptr);
}

TEST_F(ShmMemoryTest, MayOutliveItsMedium) {
  auto region = Linked();
  shm_.reset();
  region->data()[0] = std::byte{3};
  EXPECT_EQ(segments_.used(), 1);
  region.reset();
  EXPECT_EQ(segments_.used(), 0);
}

TEST_F(ShmMemoryTest, TooLargeIsRefusedAndLeavesNothing) {
  for (const uint64_t bytes : {uint64_t{0}, MachineMemory() + 1, uint64_t{1} << 63, UINT64_MAX}) {
    const absl::Status status = shm_->Create(bytes, PeerAccess::kRead).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_EQ(FactsOf(status).reason, "shm_memory");
    EXPECT_TRUE(FactsOf(status).retry_after);
    EXPECT_NE(status.message().find(std::to_string(bytes)), absl::string_view::npos) << status;
  }
  EXPECT_EQ(segments_.used(), 1);
}

TEST_F(ShmMemoryTest, EachTakesADescriptorOfItsShare) {
  std::vector<std::shared_ptr<Region>> regions;
  for (int i = 0; i < 3; ++i) regions.push_back(Linked());
  const absl::Status status = shm_->Create(1, PeerAccess::kRead).status();
  EXPECT_EQ(FactsOf(status).reason, "shm_memory") << status;
  EXPECT_NE(status.message().find("4 segments are there, and descriptors for 4"),
            absl::string_view::npos)
      << status;
  regions.pop_back();
  EXPECT_TRUE(shm_->Create(1, PeerAccess::kRead).ok());
}

TEST_F(ShmMemoryTest, AfterTheEndThereIsNoMore) {
  shm_->Close();
  EXPECT_EQ(shm_->Create(1, PeerAccess::kRead).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace prefilld
