#include "server/mapping_guard.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <string>

namespace prefilld {
namespace {

// A file of four pages of 7, mapped.
class Mapped {
 public:
  Mapped() {
    const std::string text(4 * page_, 7);
    EXPECT_EQ(write(fd_, text.data(), text.size()), static_cast<ssize_t>(text.size()));
    data_ = static_cast<char*>(mmap(nullptr, 4 * page_, PROT_READ, MAP_PRIVATE, fd_, 0));
    EXPECT_NE(data_, MAP_FAILED);
    guard_.emplace(data_, 4 * page_, PROT_READ);
  }
  ~Mapped() {
    guard_.reset();
    munmap(data_, 4 * page_);
    close(fd_);
  }
  void Truncate(int64_t pages) { EXPECT_EQ(ftruncate(fd_, pages * page_), 0); }
  bool lost() const { return guard_->lost(); }
  bool All(int64_t first, int64_t end, char value) const {
    return std::all_of(data_ + first * page_, data_ + end * page_,
                       [&](char c) { return c == value; });
  }

 private:
  const int64_t page_ = sysconf(_SC_PAGESIZE);
  const int fd_ = memfd_create("mapped", MFD_CLOEXEC);
  char* data_;
  std::optional<MappingGuard> guard_;
};

TEST(MappingGuard, WhatIsTruncatedReadsAsZerosAndIsTold) {
  Mapped kept, cut;
  EXPECT_TRUE(cut.All(0, 4, 7));
  cut.Truncate(2);
  EXPECT_FALSE(cut.lost()) << "nobody has missed anything";
  EXPECT_TRUE(cut.All(2, 4, 0));
  EXPECT_TRUE(cut.lost());
  EXPECT_TRUE(cut.All(0, 2, 7));
  EXPECT_FALSE(kept.lost());
  EXPECT_TRUE(kept.All(0, 4, 7));
}

TEST(MappingGuard, APlaceThatIsTakenAgainHasLostNothing) {
  for (int i = 0; i < 3; ++i) {
    Mapped cut;
    EXPECT_FALSE(cut.lost());
    cut.Truncate(0);
    EXPECT_TRUE(cut.All(0, 4, 0));
    EXPECT_TRUE(cut.lost());
  }
}

TEST(MappingGuardDeathTest, OtherBusErrorsEndTheProcess) {
  const Mapped guarded;
  // A sanitizer that was there before reports it and exits.
  EXPECT_EXIT(
      raise(SIGBUS), [](int status) { return status != 0; }, "");
}

}  // namespace
}  // namespace prefilld
