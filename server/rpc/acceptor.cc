#include "server/rpc/acceptor.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "server/record/log.h"

namespace prefilld {
namespace {

constexpr absl::Duration kSweepEvery = absl::Seconds(1);
constexpr absl::Duration kSweepAtLimit = absl::Milliseconds(100);  // not for each that is refused
constexpr absl::Duration kPause = absl::Milliseconds(20);  // where the system has nothing to give
constexpr int kAtOnce = 256;  // of one listener, before the others and the bell are looked at
constexpr size_t kSources =
    1 << 16;                     // that are remembered; the rest is bounded by the limit in all
constexpr double kCutCosts = 2;  // seconds' new connections

int OpenReserve() { return open("/dev/null", O_RDONLY | O_CLOEXEC); }

std::array<uint8_t, 16> SourceOf(const sockaddr_storage& address) {
  std::array<uint8_t, 16> source{};
  if (address.ss_family == AF_INET) {
    source[10] = source[11] = 0xff;
    std::memcpy(&source[12], &reinterpret_cast<const sockaddr_in&>(address).sin_addr, 4);
  } else if (address.ss_family == AF_INET6) {
    const in6_addr& v6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
    // Who has an IPv6 network has 2^64 addresses of it.
    std::memcpy(source.data(), &v6, IN6_IS_ADDR_V4MAPPED(&v6) ? 16 : 8);
  }
  return source;
}

// As grpc::ServerContext::peer() has it, without its escapes.
std::string NameOf(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    return absl::StrCat("ipv4:", text, ":", ntohs(v4.sin_port));
  }
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
  if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
    inet_ntop(AF_INET, &v6.sin6_addr.s6_addr[12], text, sizeof text);
    return absl::StrCat("ipv4:", text, ":", ntohs(v6.sin6_port));
  }
  inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
  return absl::StrCat("ipv6:[", text, "]:", ntohs(v6.sin6_port));
}

// With a reset: nothing of it stays in the system.
void CloseNow(int fd) {
  const linger none{.l_onoff = 1, .l_linger = 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
  close(fd);
}

}  // namespace

Acceptor::Acceptor(std::vector<int> listeners, ConnectionLimits limits, Serve serve,
                   Metrics& metrics)
    : listeners_(std::move(listeners)),
      limits_(limits),
      serve_(std::move(serve)),
      metrics_(metrics),
      bell_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      reserve_(OpenReserve()) {}

void Acceptor::Start() {
  thread_ = std::thread([this] { Loop(); });
}

void Acceptor::Stop() {
  if (stopping_.exchange(true)) return;
  const uint64_t one = 1;
  (void)!write(bell_, &one, sizeof one);
  if (thread_.joinable()) thread_.join();
  close(bell_);
  if (reserve_ >= 0) close(reserve_);
}

void Acceptor::Loop() {
  std::vector<pollfd> polled;
  for (const int listener : listeners_) polled.push_back({listener, POLLIN, 0});
  polled.push_back({bell_, POLLIN, 0});
  while (!stopping_) {
    int wait_ms = -1;  // nothing to look after
    {
      absl::MutexLock lock(&mutex_);
      if (Since(swept_) >= kSweepEvery) Sweep();
      if (!sources_.empty()) wait_ms = static_cast<int>(absl::ToInt64Milliseconds(kSweepEvery));
    }
    if (poll(polled.data(), polled.size(), wait_ms) <= 0) continue;
    for (size_t i = 0; i < listeners_.size() && !stopping_; ++i) {
      if (polled[i].revents != 0) AcceptAll(listeners_[i]);
    }
  }
}

void Acceptor::AcceptAll(int listener) {
  for (int i = 0; i < kAtOnce && !stopping_; ++i) {
    sockaddr_storage address{};
    socklen_t bytes = sizeof address;
    const int fd = accept4(listener, reinterpret_cast<sockaddr*>(&address), &bytes,
                           SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      Take(listener, fd, address);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK || !OnError(listener, errno)) {
      return;
    }
  }
}

bool Acceptor::OnError(int listener, int error) {
  // What came and went, and errors of the network that accept reports of a connection.
  if (error != EMFILE && error != ENFILE && error != ENOMEM && error != ENOBUFS) return true;
  if (Since(warned_) >= absl::Seconds(1)) {
    warned_ = SteadyNow();
    Log(Level::kWarning, "accept_failed", {{"message", std::strerror(error)}});
  }
  if ((error == EMFILE || error == ENFILE) && reserve_ >= 0) {
    close(reserve_);
    const int fd = accept(listener, nullptr, nullptr);
    reserve_ = -1;
    if (fd >= 0) {
      absl::MutexLock lock(&mutex_);
      Refuse(fd, "descriptors");
    }
  }
  if (reserve_ < 0) reserve_ = OpenReserve();
  if (reserve_ >= 0 && error != ENOMEM && error != ENOBUFS) return true;
  pollfd bell{bell_, POLLIN, 0};
  poll(&bell, 1, static_cast<int>(absl::ToInt64Milliseconds(kPause)));
  return false;
}

void Acceptor::Take(int listener, int fd, const sockaddr_storage& address) {
  const Source source = SourceOf(address);
  Connection connection{Behind(fd).value_or(Socket{}), source, NameOf(address), false};
  {
    absl::MutexLock lock(&mutex_);
    // Who had this number has it no more.
    if (const auto old = connections_.find(fd); old != connections_.end()) Forget(old);
    const bool self = !expected_.empty() && connection.peer == expected_;
    if (self) {
      expected_.clear();
    } else if (const char* reason = Against(source); reason != nullptr) {
      return Refuse(fd, reason);
    } else if (const auto entry = sources_.find(source); entry != sources_.end()) {
      entry->second.tokens -= 1;
      ++entry->second.live;
      connection.counted = true;
    }
    by_peer_[connection.peer] = fd;
    connections_.emplace(fd, std::move(connection));
    metrics_.connections.accepted.Increment();
    metrics_.connections.open.Set(static_cast<double>(connections_.size()));
  }
  serve_(listener, fd);
}

// Why one more of this source is too many; null: it is not.
const char* Acceptor::Against(const Source& source) {
  for (const bool again : {false, true}) {
    const bool full = static_cast<int>(connections_.size()) >= limits_.connections;
    auto found = sources_.find(source);
    if (found == sources_.end() && sources_.size() < kSources) {
      const double burst = limits_.new_per_second * ConnectionLimits::kBurst;
      found = sources_.emplace(source, PerSource{0, burst, SteadyNow()}).first;
    }
    const bool many = found != sources_.end() && found->second.live >= limits_.per_address;
    if (!full && !many) {
      if (found == sources_.end()) return nullptr;
      Refill(found->second);
      return found->second.tokens < 1 ? "rate" : nullptr;
    }
    if (again || Since(swept_) < kSweepAtLimit) return full ? "limit" : "address";
    Sweep();
  }
  return nullptr;
}

void Acceptor::Refill(PerSource& source) const {
  const double seconds = absl::ToDoubleSeconds(Since(source.at));
  source.at = SteadyNow();
  source.tokens = std::min(source.tokens + seconds * limits_.new_per_second,
                           limits_.new_per_second * ConnectionLimits::kBurst);
}

void Acceptor::Refuse(int fd, const char* reason) {
  CloseNow(fd);
  metrics_.connections.Refused(reason);
}

std::optional<Acceptor::Socket> Acceptor::Behind(int fd) {
  struct stat info;
  if (fstat(fd, &info) != 0) return std::nullopt;
  return Socket{info.st_dev, info.st_ino};
}

void Acceptor::Sweep() {
  swept_ = SteadyNow();
  for (auto it = connections_.begin(); it != connections_.end();) {
    const auto connection = it++;
    if (Behind(connection->first) != connection->second.socket) Forget(connection);
  }
  metrics_.connections.open.Set(static_cast<double>(connections_.size()));
  for (auto it = sources_.begin(); it != sources_.end();) {
    const auto source = it++;
    Refill(source->second);
    const bool full = source->second.tokens >= limits_.new_per_second * ConnectionLimits::kBurst;
    if (source->second.live == 0 && full) sources_.erase(source);
  }
}

void Acceptor::Forget(std::unordered_map<int, Connection>::iterator connection) {
  // One that counts is not swept away.
  if (connection->second.counted) --sources_.find(connection->second.source)->second.live;
  const auto named = by_peer_.find(connection->second.peer);
  if (named != by_peer_.end() && named->second == connection->first) by_peer_.erase(named);
  connections_.erase(connection);
}

void Acceptor::Expect(const sockaddr_storage& self) {
  absl::MutexLock lock(&mutex_);
  expected_ = NameOf(self);
}

std::unordered_map<int, Acceptor::Connection>::iterator Acceptor::Find(const std::string& peer) {
  const auto fd = by_peer_.find(absl::StrReplaceAll(peer, {{"%5B", "["}, {"%5D", "]"}}));
  return fd == by_peer_.end() ? connections_.end() : connections_.find(fd->second);
}

bool Acceptor::Connected(const std::string& peer) {
  absl::MutexLock lock(&mutex_);
  const auto found = Find(peer);
  if (found == connections_.end()) return false;
  tcp_info info{};
  socklen_t bytes = sizeof info;
  const int fd = found->first;
  return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) == 0 &&
         info.tcpi_state == TCP_ESTABLISHED && Behind(fd) == found->second.socket;
}

// gRPC may close the descriptor at any time, and its number may be another's then: what is shut
// down is what a descriptor of our own shows to be the connection.
void Acceptor::Cut(const std::string& peer, const char* why) {
  absl::MutexLock lock(&mutex_);
  const auto found = Find(peer);
  if (found == connections_.end()) return;
  const int fd = fcntl(found->first, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return;
  const bool ours = Behind(fd) == found->second.socket;
  if (ours) shutdown(fd, SHUT_RDWR);
  close(fd);
  if (!ours) return;
  metrics_.connections.Refused(why);
  Log(Level::kWarning, "connection_cut", {{"peer", found->second.peer}, {"reason", why}});
  if (const auto source = sources_.find(found->second.source); source != sources_.end()) {
    const double cost = kCutCosts * limits_.new_per_second;
    source->second.tokens = std::max(source->second.tokens, 0.0) - cost;
  }
}

}  // namespace prefilld
