#include "server/transport/descriptor_socket.h"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <ctime>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "tests/server/fake_device.h"
#include "tests/server/importer.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

using Outcome = DescriptorSocket::Outcome;

constexpr uint64_t kBytes = 4096;
constexpr uid_t kNobody = 65534;

int Descriptors() {
  int count = 0;
  DIR* directory = opendir("/proc/self/fd");
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

rlimit DescriptorLimit() {
  rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  return limit;
}

// Hands out one piece of memory, under the name "memory".
class DescriptorSocketTest : public testing::Test {
 protected:
  DescriptorSocketTest() {
    EXPECT_EQ(ftruncate(memory_, kBytes), 0);
    Listen(absl::StrCat("@prefilld-test-", getpid()));
  }
  ~DescriptorSocketTest() override {
    socket_.reset();
    EXPECT_EQ(share_.use_count(), 1);
    close(memory_);
  }

  absl::Status TryListen(const std::string& address, absl::Duration timeout = absl::Seconds(30)) {
    auto socket =
        DescriptorSocket::Listen({.address = address,
                                  .find = [this](const std::string& name) { return Find(name); },
                                  .told =
                                      [this](Outcome outcome) {
                                        absl::MutexLock lock(&mutex_);
                                        told_.push_back(outcome);
                                      },
                                  .name_timeout = timeout});
    if (socket.ok()) socket_ = *std::move(socket);
    return socket.status();
  }
  void Listen(const std::string& address, absl::Duration timeout = absl::Seconds(30)) {
    socket_.reset();
    const absl::Status status = TryListen(address, timeout);
    ASSERT_TRUE(status.ok()) << status;
  }
  DescriptorSocket::Handout Find(const std::string& name) {
    if (name != "memory") return {nullptr, 0, absl::NotFoundError("nothing")};
    const int descriptor = fcntl(memory_, F_DUPFD_CLOEXEC, 0);
    if (descriptor < 0) return {share_, kBytes, absl::InternalError("no descriptor")};
    return {share_, kBytes, descriptor};
  }
  // That say nothing.
  std::vector<Importer> Connect(int count) const {
    std::vector<Importer> importers;
    for (int i = 0; i < count; ++i) {
      importers.emplace_back();
      EXPECT_TRUE(importers.back().Connect(socket_->address())) << i;
    }
    return importers;
  }
  int Told(Outcome outcome) const {
    absl::MutexLock lock(&mutex_);
    return static_cast<int>(std::count(told_.begin(), told_.end(), outcome));
  }
  bool InUse(int64_t times) {
    return Becomes([&] { return share_.use_count() == 1 + times; });
  }

  const int memory_ = memfd_create("test", MFD_CLOEXEC);
  Gate gate_;  // of whoever has the last share but ours
  std::shared_ptr<void> share_{nullptr, [](void*) {}};
  mutable absl::Mutex mutex_;
  std::vector<Outcome> told_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<DescriptorSocket> socket_;
};

TEST_F(DescriptorSocketTest, GivesADescriptorAndHoldsAShareUntilThePeerHangsUp) {
  std::byte first{0};
  {
    Importer one(socket_->address());
    std::byte* const mapped = one.Map("memory");
    ASSERT_NE(mapped, nullptr);
    EXPECT_EQ(one.bytes(), kBytes);
    mapped[7] = std::byte{42};
    EXPECT_TRUE(InUse(1));
    Importer two(socket_->address());
    EXPECT_NE(two.Map("memory"), nullptr);
    EXPECT_TRUE(InUse(2));
    // What it says then is of no interest, nor that it says no more.
    EXPECT_TRUE(one.Say("memory"));
    EXPECT_EQ(shutdown(one.fd(), SHUT_WR), 0);
    absl::SleepFor(absl::Milliseconds(50));
    EXPECT_EQ(share_.use_count(), 3);
  }
  EXPECT_TRUE(InUse(0));
  ASSERT_EQ(pread(memory_, &first, 1, 7), 1);
  EXPECT_EQ(first, std::byte{42});
  EXPECT_EQ(Told(Outcome::kGiven), 2);
}

TEST_F(DescriptorSocketTest, WhatIsNoNameIsAnsweredInWords) {
  for (const std::string& name : {std::string("x"), std::string("memory2"), std::string(64, 'a'),
                                  std::string(1000, '\0'), std::string(60'000, 'a')}) {
    const Importer importer(socket_->address());
    const auto answer = importer.Ask(name);
    EXPECT_TRUE(answer.any);
    EXPECT_EQ(answer.bytes, 0u);
    EXPECT_EQ(answer.descriptor, -1);
    EXPECT_EQ(answer.text, "nothing");
    EXPECT_FALSE(importer.Hear().any) << "it has hung up";
  }
  EXPECT_EQ(Told(Outcome::kUnknown), 5);
  const Importer empty(socket_->address());
  EXPECT_FALSE(empty.Ask("").any);
}

TEST_F(DescriptorSocketTest, DescriptorsThatAPeerSendsAreDropped) {
  const int before = Descriptors();
  std::vector<Importer> importers;
  for (int i = 0; i < 20; ++i) {
    importers.emplace_back(socket_->address());
    char name[] = "memory";
    iovec part{name, sizeof name - 1};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &memory_, sizeof memory_);
    ASSERT_GE(sendmsg(importers.back().fd(), &message, 0), 0);
    const auto answer = importers.back().Hear();
    EXPECT_EQ(answer.bytes, kBytes);
    close(answer.descriptor);
  }
  EXPECT_TRUE(Becomes([&] { return Descriptors() == before + 2 * 20; }))
      << "both ends of the connections, and no more";
}

TEST_F(DescriptorSocketTest, WhoSaysNothingInTimeIsHungUpOn) {
  Listen(socket_->address() + "-2", absl::Milliseconds(100));
  const Importer named(socket_->address());
  close(named.Ask("memory").descriptor);
  const Importer silent(socket_->address());
  EXPECT_FALSE(silent.Hear().any);
  EXPECT_EQ(Told(Outcome::kSilent), 1);
  EXPECT_EQ(share_.use_count(), 2) << "who has said it may be silent";
}

TEST_F(DescriptorSocketTest, AFloodOfTheSilentIsBoundedAndEndsWithThem) {
  auto silent = Connect(DescriptorSocket::kUnnamedMax);
  {
    const Importer beyond(socket_->address());
    const auto answer = beyond.Hear();  // at once
    EXPECT_TRUE(answer.any && answer.bytes == 0 && answer.descriptor < 0);
    EXPECT_EQ(Told(Outcome::kFull), 1);
  }
  close(silent.back().Ask("memory").descriptor);
  const Importer next(socket_->address());
  const auto answer = next.Ask("memory");
  EXPECT_EQ(answer.bytes, kBytes) << "there is a place again";
  close(answer.descriptor);
  silent.clear();
  EXPECT_TRUE(InUse(1));
}

TEST_F(DescriptorSocketTest, ConnectionsAreBounded) {
  const rlimit before = DescriptorLimit();
  rlimit more = before;
  more.rlim_cur = 4096;
  if (setrlimit(RLIMIT_NOFILE, &more) != 0) GTEST_SKIP() << "not so many descriptors";
  std::vector<Importer> importers;
  for (int i = 0; i < 1024; ++i) {
    importers.emplace_back(socket_->address());
    const auto answer = importers.back().Ask("memory");
    ASSERT_EQ(answer.bytes, kBytes) << i;
    close(answer.descriptor);
  }
  EXPECT_LT(Importer(socket_->address()).Ask("memory").descriptor, 0);
  EXPECT_EQ(Told(Outcome::kFull), 1);
  importers.pop_back();
  EXPECT_TRUE(Becomes([&] {
    const auto answer = Importer(socket_->address()).Ask("memory");
    if (answer.descriptor >= 0) close(answer.descriptor);
    return answer.descriptor >= 0;
  }));
  importers.clear();
  EXPECT_TRUE(InUse(0));
  setrlimit(RLIMIT_NOFILE, &before);
}

TEST_F(DescriptorSocketTest, OutOfDescriptorsItNeitherSpinsNorIsLost) {
  Importer importer;
  const rlimit before = DescriptorLimit();
  rlimit none = before;
  none.rlim_cur = static_cast<rlim_t>(dup(0));  // the least that is free
  close(static_cast<int>(none.rlim_cur));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  EXPECT_TRUE(importer.Connect(socket_->address()));
  const clock_t begin = std::clock();
  absl::SleepFor(absl::Milliseconds(500));
  const double busy = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_LT(busy, 0.1);
  const auto answer = importer.Ask("memory");
  EXPECT_EQ(answer.bytes, kBytes);
  close(answer.descriptor);
}

TEST_F(DescriptorSocketTest, WithoutADescriptorForItThePeerIsTold) {
  const auto importers = Connect(1);
  EXPECT_TRUE(Becomes([&] { return Told(Outcome::kFull) == 0; }));
  absl::SleepFor(absl::Milliseconds(50));  // it is accepted
  const rlimit before = DescriptorLimit();
  rlimit none = before;
  none.rlim_cur = static_cast<rlim_t>(dup(0));
  close(static_cast<int>(none.rlim_cur));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const auto answer = importers[0].Ask("memory");
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(answer.bytes, 0u);
  EXPECT_EQ(answer.text, "no descriptor");
  EXPECT_EQ(Told(Outcome::kFailed), 1);
  EXPECT_TRUE(InUse(0));
}

TEST_F(DescriptorSocketTest, AKilledPeerHasHungUp) {
  const pid_t child = fork();
  if (child == 0) {
    Importer importer(socket_->address());
    if (importer.Map("memory") == nullptr) _exit(1);
    importer.mapped()[0] = std::byte{9};
    for (;;) pause();
  }
  EXPECT_TRUE(InUse(1));
  std::byte first{0};
  EXPECT_TRUE(Becomes([&] { return pread(memory_, &first, 1, 0) == 1 && first == std::byte{9}; }));
  EXPECT_EQ(share_.use_count(), 2);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(InUse(0));
}

TEST_F(DescriptorSocketTest, AnotherUserIsRefusedInWords) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root";
  const pid_t child = fork();
  if (child == 0) {
    if (setuid(kNobody) != 0) _exit(2);
    const Importer importer(socket_->address());
    importer.Say("memory");
    const auto answer = importer.Hear();
    const bool told = answer.any && answer.bytes == 0 && answer.descriptor == -1 &&
                      absl::StrContains(answer.text, absl::StrCat("user ", kNobody));
    _exit(told ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(Told(Outcome::kPeer), 1);
  EXPECT_EQ(Told(Outcome::kGiven), 0);
}

// To let go of memory may take long.
TEST_F(DescriptorSocketTest, NobodyWaitsForAShareToGo) {
  gate_.Hold();
  std::shared_ptr<void> slow(nullptr, [this](void*) { gate_.Pass(); });
  share_.swap(slow);
  {
    Importer importer(socket_->address());
    ASSERT_NE(importer.Map("memory"), nullptr);
    share_.swap(slow);
    slow.reset();
  }
  gate_.AwaitWaiter();
  const auto answer = Importer(socket_->address()).Ask("memory");
  EXPECT_EQ(answer.bytes, kBytes);
  close(answer.descriptor);
  gate_.Release();
}

TEST_F(DescriptorSocketTest, AfterTheEndNobodyComesAndWhoIsThereStays) {
  Importer importer(socket_->address());
  ASSERT_NE(importer.Map("memory"), nullptr);
  socket_->Close();
  EXPECT_TRUE(Becomes([&] { return !Importer().Connect(socket_->address()); }));
  EXPECT_EQ(share_.use_count(), 2);
  socket_.reset();
  EXPECT_FALSE(importer.Hear().any);
  EXPECT_EQ(share_.use_count(), 1);
}

class PathTest : public DescriptorSocketTest {
 protected:
  PathTest() { EXPECT_NE(mkdtemp(directory_), nullptr); }
  ~PathTest() override {
    socket_.reset();
    unlink(path().c_str());
    EXPECT_EQ(rmdir(directory_), 0) << "something is left";
  }
  std::string path() const { return absl::StrCat(directory_, "/socket"); }

  char directory_[32] = "/tmp/prefilld-test-XXXXXX";
};

TEST_F(PathTest, IsTheUsersAloneAndGoesAtTheEnd) {
  Listen(path());
  struct stat info;
  ASSERT_EQ(stat(path().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  Importer importer(path());
  EXPECT_NE(importer.Map("memory"), nullptr);
  socket_->Close();
  EXPECT_NE(stat(path().c_str(), &info), 0);
}

TEST_F(PathTest, OneInUseIsNotTakenAndAStaleOneIs) {
  Listen(path());
  auto first = std::move(socket_);
  for (const std::string& address :
       {path(), absl::StrCat("@prefilld-test-", getpid(), "-in-use")}) {
    if (address != path()) {
      first.reset();
      Listen(address);
      first = std::move(socket_);
    }
    const absl::Status status = TryListen(address);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), address)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "in use")) << status;
    const auto answer = Importer(address).Ask("memory");
    EXPECT_TRUE(answer.any) << "it is as it was";
    close(answer.descriptor);
  }
  const pid_t child = fork();
  if (child == 0) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path().data(), path().size());
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    _exit(bind(fd, reinterpret_cast<sockaddr*>(&name), sizeof name) == 0 && listen(fd, 1) == 0 ? 0
                                                                                               : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  ASSERT_EQ(status, 0);
  EXPECT_FALSE(Importer().Connect(path())) << "nobody is there";
  Listen(path());
  const auto answer = Importer(path()).Ask("memory");
  EXPECT_TRUE(answer.any);
  close(answer.descriptor);
  first.reset();
}

TEST_F(PathTest, WhatIsNoSocketStays) {
  std::ofstream(path()) << "data";
  const absl::Status status = TryListen(path());
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_EQ(access(path().c_str(), F_OK), 0);
}

TEST_F(PathTest, WhatSomebodyElseHasPutThereStaysAtTheEnd) {
  Listen(path());
  unlink(path().c_str());
  std::ofstream(path()) << "data";
  socket_->Close();
  EXPECT_EQ(access(path().c_str(), F_OK), 0);
}

TEST_F(PathTest, WhatCannotBeAnAddressIsRefusedByName) {
  for (const std::string& address : {std::string(), std::string("@"), std::string("relative"),
                                     "/" + std::string(107, 'x'), "@" + std::string(107, 'x')}) {
    const absl::Status status = TryListen(address);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), address)) << status;
  }
  EXPECT_EQ(TryListen(absl::StrCat(directory_, "/none/socket")).code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace prefilld
