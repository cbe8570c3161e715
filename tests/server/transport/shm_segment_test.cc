#include "server/transport/shm_segment.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

// Not another test's, nor another run's.
std::string Owner() {
  static std::atomic<int> next{0};
  return absl::StrCat("t", next++, "x", getpid(), "-------------");
}

std::string PathOf(const Region& segment) { return "/dev/shm" + segment.address().name; }
bool Exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

// A segment as a server leaves it that was killed.
std::string Orphan(const std::string& owner) {
  const std::string path = absl::StrCat("/dev/shm/prefilld-", owner.substr(0, 12), "-1");
  const int fd = open(path.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
  EXPECT_GE(fd, 0) << path;
  EXPECT_EQ(posix_fallocate(fd, 0, 8192), 0);
  close(fd);
  return path;
}

TEST(ShmDomain, IsTheKernelsBootAndTheDevice) {
  auto domain = *ShmDomain::Open(Owner());
  struct stat info;
  ASSERT_EQ(stat("/dev/shm", &info), 0);
  const std::string& name = domain->name();
  EXPECT_EQ(name.find(':'), 36u) << name;
  EXPECT_EQ(name.substr(37), std::to_string(info.st_dev));
  EXPECT_EQ((*ShmDomain::Open(Owner()))->name(), name) << "the same for every server here";
}

TEST(ShmSegment, IsZeroedPrivateToTheUserAndSharedByName) {
  auto domain = *ShmDomain::Open(Owner());
  auto segment = *domain->Create(10'000);
  ASSERT_EQ(segment->bytes(), 10'000u);
  EXPECT_EQ(segment->address().name.substr(0, 10), "/prefilld-");
  EXPECT_EQ(segment->address().name.find('/', 1), std::string::npos);
  for (uint64_t i = 0; i < segment->bytes(); ++i) ASSERT_EQ(segment->data()[i], std::byte{0});
  struct stat info;
  ASSERT_EQ(stat(PathOf(*segment).c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_EQ(info.st_size, 10'000);
  EXPECT_GE(info.st_blocks * 512, 10'000) << "the memory is taken, not promised";

  const int fd = shm_open(segment->address().name.c_str(), O_RDONLY, 0);
  ASSERT_GE(fd, 0);
  void* mapped = mmap(nullptr, 10'000, PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  ASSERT_NE(mapped, MAP_FAILED);
  segment->data()[9'999] = std::byte{7};
  EXPECT_EQ(static_cast<const std::byte*>(mapped)[9'999], std::byte{7});
  const std::string path = PathOf(*segment);
  segment.reset();
  EXPECT_FALSE(Exists(path));
  EXPECT_EQ(static_cast<const std::byte*>(mapped)[9'999], std::byte{7}) << "who mapped it keeps it";
  munmap(mapped, 10'000);
}

TEST(ShmSegment, UnlinkedIsStillMapped) {
  auto domain = *ShmDomain::Open(Owner());
  auto segment = *domain->Create(100);
  segment->Unlink();
  EXPECT_FALSE(Exists(PathOf(*segment)));
  std::memset(segment->data(), 1, 100);
  segment->Unlink();
}

TEST(ShmSegment, OneThatAPeerTruncatesIsNoUseToOthersAndHarmsNobody) {
  auto domain = *ShmDomain::Open(Owner());
  for (const bool touched : {false, true}) {
    auto segment = *domain->Create(1 << 16);
    std::memset(segment->data(), 1, 1 << 16);
    segment->SetUnmapped(true);
    EXPECT_TRUE(segment->unmapped());
    ASSERT_EQ(truncate(PathOf(*segment).c_str(), 0), 0);
    if (touched) {
      std::memset(segment->data(), 2, 1 << 16);
      EXPECT_EQ(segment->data()[65535], std::byte{2});
    }
    EXPECT_FALSE(segment->unmapped()) << "it is not used again";
  }
}

TEST(ShmSegment, NamesAreNeverUsedAgain) {
  auto domain = *ShmDomain::Open(Owner());
  std::set<std::string> names;
  for (int i = 0; i < 10; ++i)
    EXPECT_TRUE(names.insert((*domain->Create(1))->address().name).second);
}

TEST(ShmSegment, TooLargeIsRefusedAndLeavesNothing) {
  const std::string owner = Owner();
  auto domain = *ShmDomain::Open(owner);
  for (uint64_t bytes : {uint64_t{0}, uint64_t{1} << 50, uint64_t{1} << 63, UINT64_MAX}) {
    const absl::Status status = domain->Create(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
    EXPECT_EQ(FactsOf(status).reason, "shm_memory");
    EXPECT_TRUE(FactsOf(status).retry_after);
    EXPECT_NE(status.message().find(std::to_string(bytes)), absl::string_view::npos) << status;
  }
  for (int i = 0; i < 10; ++i) {
    EXPECT_FALSE(Exists(absl::StrCat("/dev/shm/prefilld-", owner.substr(0, 12), "-", i)));
  }
}

TEST(ShmDomain, TheLargestIsAllThatIsNeverTooLarge) {
  const auto domain = *ShmDomain::Open(Owner());
  struct statvfs size;
  ASSERT_EQ(statvfs("/dev/shm", &size), 0);
  if (size.f_blocks == 0) GTEST_SKIP() << "it has no size";
  EXPECT_EQ(domain->Largest(), uint64_t{size.f_blocks} * size.f_frsize - 1);
  EXPECT_GE(domain->Largest() + 1, domain->Room());
}

TEST(ShmDomain, TakesAwayWhatDeadServersLeftAndNothingElse) {
  auto living = *ShmDomain::Open(Owner());
  auto segment = *living->Create(100);
  const std::string orphan = Orphan(Owner());
  const std::string other = absl::StrCat("/dev/shm/someone-", getpid());
  close(open(other.c_str(), O_CREAT | O_RDWR, 0600));
  const std::string link = absl::StrCat("/dev/shm/prefilld-link-", getpid());
  ASSERT_EQ(symlink(other.c_str(), link.c_str()), 0);

  auto next = *ShmDomain::Open(Owner());
  EXPECT_FALSE(Exists(orphan));
  EXPECT_TRUE(Exists(PathOf(*segment))) << "its server lives";
  EXPECT_TRUE(Exists(other));
  unlink(other.c_str());
  unlink(link.c_str());
}

TEST(ShmDomain, CloseTakesItsOwnAndMakesNoMore) {
  auto mine = *ShmDomain::Open(Owner());
  auto theirs = *ShmDomain::Open(Owner());
  auto a = *mine->Create(1), b = *mine->Create(1), c = *theirs->Create(1);
  mine->Close();
  EXPECT_FALSE(Exists(PathOf(*a)));
  EXPECT_FALSE(Exists(PathOf(*b)));
  EXPECT_TRUE(Exists(PathOf(*c)));
  EXPECT_EQ(mine->Create(1).status().code(), absl::StatusCode::kResourceExhausted);
}

// A sweep between the making of a file and its lock takes it away; the maker tries again.
TEST(ShmDomain, SegmentsMadeDuringSweepsLive) {
  auto domain = *ShmDomain::Open(Owner());
  std::atomic<bool> stop{false};
  std::thread sweeper([&] {
    while (!stop) ASSERT_TRUE(ShmDomain::Open(Owner()).ok());
  });
  for (int i = 0; i < 2000; ++i) {
    auto segment = domain->Create(1);
    ASSERT_TRUE(segment.ok()) << segment.status();
    ASSERT_TRUE(Exists(PathOf(**segment)));
  }
  stop = true;
  sweeper.join();
}

}  // namespace
}  // namespace prefilld
