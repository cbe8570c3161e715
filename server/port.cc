#include "server/port.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

// What each connection has from the socket that it comes to. A peer that is gone without a word is
// given up after what keepalive waits for it.
void SetOptions(int fd, const sockaddr* address) {
  const int on = 1, off = 0, gone_ms = 20'000;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (address->sa_family == AF_UNIX) return;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &gone_ms, sizeof gone_ms);
  if (address->sa_family == AF_INET6) {
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  }
}

// A socket with this address. -1: see errno.
int Bind(const sockaddr* address, socklen_t bytes) {
  const int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  SetOptions(fd, address);
  if (bind(fd, address, bytes) == 0) return fd;
  const int why = errno;
  close(fd);
  errno = why;
  return -1;
}

uint16_t PortOf(int fd) {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &bytes);
  return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);  // where sin6_port is too
}

// Every address of both kinds; or one of the kind that was named, where that is not to be had.
int BindAny(const Endpoint& endpoint) {
  sockaddr_in6 any{};
  any.sin6_family = AF_INET6;
  any.sin6_port = htons(static_cast<uint16_t>(endpoint.port));
  return Bind(reinterpret_cast<const sockaddr*>(&any), sizeof any);
}

// A name in the host's abstract sockets (of its network namespace, as ports are), which one process
// has at a time and which ends with it. -1: see errno.
int Claim(const Endpoint& endpoint) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = absl::StrCat("prefilld listens on ", endpoint.ToString());
  const size_t length = std::min(name.size(), sizeof address.sun_path - 1);
  std::memcpy(address.sun_path + 1, name.data(), length);  // behind a zero: abstract
  const auto bytes = offsetof(sockaddr_un, sun_path) + 1 + length;
  return Bind(reinterpret_cast<const sockaddr*>(&address), static_cast<socklen_t>(bytes));
}

}  // namespace

absl::StatusOr<HeldPort> HeldPort::Take(const Endpoint& endpoint) {
  const auto refuse = [&](const char* why) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", endpoint.ToString(), ": ", why));
  };
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  const int error =
      getaddrinfo(endpoint.host.c_str(), std::to_string(endpoint.port).c_str(), &hints, &found);
  if (error != 0) return refuse(gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> addresses(found, freeaddrinfo);
  HeldPort held(endpoint);
  if (endpoint.port > 0 && (held.name_ = Claim(endpoint)) < 0 && errno == EADDRINUSE) {
    return refuse("another prefilld, which is still starting, will");
  }
  int why = 0;
  if (endpoint.host == "0.0.0.0" || endpoint.host == "::") {
    if (const int fd = BindAny(endpoint); fd >= 0) {
      held.Add(fd);
      return held;
    } else if (errno == EADDRINUSE) {
      return refuse(std::strerror(errno));
    }
  }
  for (const addrinfo* address = found; address != nullptr; address = address->ai_next) {
    // In the place of 0 what the system has picked for the first of them.
    reinterpret_cast<sockaddr_in*>(address->ai_addr)->sin_port =
        htons(static_cast<uint16_t>(held.endpoint_.port));
    if (const int fd = Bind(address->ai_addr, address->ai_addrlen); fd >= 0) {
      held.Add(fd);
    } else if (why = errno; why == EADDRINUSE) {
      return refuse(std::strerror(why));
    }
  }
  // A host may have names for addresses of a kind that this one lacks.
  if (held.sockets_.empty()) return refuse(std::strerror(why));
  return held;
}

void HeldPort::Add(int fd) {
  sockets_.push_back(fd);
  endpoint_.port = PortOf(fd);
}

absl::Status HeldPort::Listen() {
  for (const int fd : sockets_) {
    if (listen(fd, SOMAXCONN) != 0) {
      return absl::UnavailableError(absl::StrCat("cannot listen on ", endpoint_.ToString(), ": ",
                                                 std::strerror(errno),
                                                 ": did somebody else begin to meanwhile?"));
    }
  }
  close(std::exchange(name_, -1));  // who binds sees it now
  return absl::OkStatus();
}

HeldPort::~HeldPort() {
  for (const int fd : sockets_) close(fd);
  if (name_ >= 0) close(name_);
}

}  // namespace prefilld
