#include "server/port.h"

#include <netdb.h>
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

// A socket with this address. -1: see errno.
int Bind(const sockaddr* address, socklen_t bytes) {
  const int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int on = 1;
  if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) == 0 &&
      bind(fd, address, bytes) == 0) {
    return fd;
  }
  const int why = errno;
  close(fd);
  errno = why;
  return -1;
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
  HeldPort held;
  int why = 0;
  bool bound = false;
  if (endpoint.port > 0) {
    if (const int fd = Claim(endpoint); fd >= 0) {
      held.fds_.push_back(fd);
    } else if (errno == EADDRINUSE) {
      return refuse("another prefilld, which is still starting, will");
    }
  }
  for (const addrinfo* address = found; address != nullptr; address = address->ai_next) {
    if (const int fd = Bind(address->ai_addr, address->ai_addrlen); fd >= 0) {
      held.fds_.push_back(fd);
      bound = true;
    } else if (why = errno; why == EADDRINUSE) {
      return refuse(std::strerror(why));
    }
  }
  // A host may have names for addresses of a kind that this one lacks.
  if (!bound) return refuse(std::strerror(why));
  return held;
}

HeldPort::~HeldPort() {
  for (const int fd : fds_) close(fd);
}

}  // namespace prefilld
