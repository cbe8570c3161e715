// Over loopback; what gRPC does with a connection is done here.
#include "server/rpc/acceptor.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "server/rpc/self_check.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

class AcceptorTest : public testing::Test {
 protected:
  AcceptorTest() {
    sockaddr_in any{.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    EXPECT_EQ(bind(listener_, reinterpret_cast<const sockaddr*>(&any), sizeof any), 0);
    EXPECT_EQ(listen(listener_, 64), 0);
    EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address_), &bytes_), 0);
  }
  ~AcceptorTest() override {
    for (const int fd : clients_) close(fd);
    for (const int fd : Served()) close(fd);
    close(listener_);
  }
  std::unique_ptr<Acceptor> Accept(ConnectionLimits limits) {
    auto acceptor = std::make_unique<Acceptor>(
        std::vector{listener_}, limits,
        [this](int, int fd) {
          absl::MutexLock lock(&mutex_);
          served_.push_back(fd);
        },
        metrics_);
    acceptor->Start();
    return acceptor;
  }
  int Connect() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(&address_), bytes_), 0);
    clients_.push_back(fd);
    return fd;
  }
  std::vector<int> Served() {
    absl::MutexLock lock(&mutex_);
    return served_;
  }
  bool Serves(size_t connections) {
    return Becomes([&] { return Served().size() == connections; });
  }
  // Of the next one; blocks.
  static bool Ended(int client) {
    char byte;
    return recv(client, &byte, 1, 0) <= 0;
  }
  std::string PeerOf(int client) {
    sockaddr_in own{};
    socklen_t bytes = sizeof own;
    getsockname(client, reinterpret_cast<sockaddr*>(&own), &bytes);
    return "ipv4:127.0.0.1:" + std::to_string(ntohs(own.sin_port));
  }
  void CloseServed() {
    absl::MutexLock lock(&mutex_);
    for (const int fd : std::exchange(served_, {})) close(fd);
  }

  Metrics metrics_;
  sockaddr_in address_{};
  socklen_t bytes_ = sizeof address_;
  int listener_;
  std::vector<int> clients_;
  absl::Mutex mutex_;
  std::vector<int> served_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(AcceptorTest, WhoIsClosedMakesRoomForOthers) {
  const auto acceptor = Accept({.connections = 3, .per_address = 3});
  for (int i = 0; i < 3; ++i) Connect();
  ASSERT_TRUE(Serves(3));
  EXPECT_TRUE(Ended(Connect())) << "one too many";
  EXPECT_EQ(metrics_.connections.open.Value(), 3);
  CloseServed();
  ASSERT_TRUE(Becomes([this] { return metrics_.connections.open.Value() == 0; }))
      << "it looks by itself";
  for (int i = 0; i < 3; ++i) Connect();
  EXPECT_TRUE(Serves(3));
}

TEST_F(AcceptorTest, ANumberThatIsAnothersNowIsNoConnection) {
  const auto acceptor = Accept({.connections = 1, .per_address = 1});
  Connect();
  ASSERT_TRUE(Serves(1));
  const int number = Served()[0];
  ASSERT_EQ(dup2(listener_, number), number);  // closes it, and is there at once
  EXPECT_TRUE(Becomes([this] { return metrics_.connections.open.Value() == 0; }));
}

TEST_F(AcceptorTest, OneAddressHasItsShareOnly) {
  const auto acceptor = Accept({.connections = 10, .per_address = 2});
  Connect();
  Connect();
  ASSERT_TRUE(Serves(2));
  EXPECT_TRUE(Ended(Connect()));
  EXPECT_EQ(Served().size(), 2);
}

TEST_F(AcceptorTest, NewOnesComeNoFasterThanTheyMay) {
  const auto acceptor = Accept({.new_per_second = .4});  // two at once
  Connect();
  Connect();
  ASSERT_TRUE(Serves(2));
  EXPECT_TRUE(Ended(Connect()));
  EXPECT_TRUE(Becomes([this] {
    Connect();
    return Served().size() == 3;
  })) << "time gives new ones";
}

TEST_F(AcceptorTest, TheServersOwnIsUnderNoLimit) {
  const auto acceptor = Accept({.connections = 0});
  EXPECT_TRUE(Ended(Connect()));
  const SelfCheckOptions options{.listener = listener_, .timeout = absl::Milliseconds(200)};
  EXPECT_FALSE(CheckPort(options, [&](const sockaddr_storage& own) { acceptor->Expect(own); }).ok())
      << "nobody answers";
  EXPECT_TRUE(Serves(1));
}

TEST_F(AcceptorTest, CutsOffWhomItIsToldTo) {
  const auto acceptor = Accept({});
  const int other = Connect(), client = Connect();
  ASSERT_TRUE(Serves(2));
  acceptor->Cut(PeerOf(client), "rapid_reset");
  EXPECT_TRUE(Ended(client));
  char byte = 'x';
  EXPECT_EQ(send(Served()[0], &byte, 1, MSG_NOSIGNAL) + send(Served()[1], &byte, 1, MSG_NOSIGNAL),
            0)
      << "one lives (1), one does not (-1)";
  EXPECT_EQ(recv(other, &byte, 1, 0), 1);
}

TEST_F(AcceptorTest, AStopHandsNothingOverAnyMore) {
  const auto acceptor = Accept({});
  acceptor->Stop();
  Connect();  // the system takes it
  EXPECT_TRUE(Served().empty());
}

// It connects to a port at which nobody accepts, too.
TEST_F(AcceptorTest, APortThatNobodyServesDoesNotPassTheCheck) {
  const SelfCheckOptions options{.listener = listener_, .timeout = absl::Milliseconds(100)};
  EXPECT_EQ(CheckPort(options, nullptr).message(), "HTTP/2: no answer in time");
  EXPECT_EQ(
      CheckPort({.listener = listener_, .tls = true, .timeout = absl::Milliseconds(100)}, nullptr)
          .code(),
      absl::StatusCode::kUnavailable);
}

TEST_F(AcceptorTest, TheCheckTellsOnceThatThePortIsDeadAndOnceThatItLives) {
  const auto acceptor = Accept({});
  absl::Mutex mutex;
  std::vector<bool> told;
  const auto times = [&] {
    absl::MutexLock lock(&mutex);
    return told.size();
  };
  std::atomic<bool> answers{false};
  std::thread server([&] {  // of the first byte of what is SETTINGS
    while (times() < 2) {
      if (answers) {
        absl::MutexLock lock(&mutex_);
        for (const int fd : std::exchange(served_, {})) {
          EXPECT_EQ(send(fd, "\0\0\0\4\0\0\0\0\0", 9, MSG_NOSIGNAL), 9);
          close(fd);
        }
      }
      absl::SleepFor(absl::Milliseconds(1));
    }
  });
  {
    const SelfCheck check(
        {.listener = listener_, .every = absl::Milliseconds(5), .timeout = absl::Milliseconds(300)},
        *acceptor, [&](const absl::Status& status) {
          absl::MutexLock lock(&mutex);
          told.push_back(status.ok());
        });
    EXPECT_TRUE(Becomes([&] { return times() == 1; }));
    CloseServed();
    answers = true;
    EXPECT_TRUE(Becomes([&] { return times() == 2; }));
  }
  server.join();
  EXPECT_EQ(told, std::vector({false, true}));
}

}  // namespace
}  // namespace prefilld
