#include "client/cli/peers.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <grpcpp/create_channel_posix.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace prefilld::cli {
namespace {

constexpr uint32_t kFirstSource = 0x7f000101;  // 127.0.1.1

std::optional<sockaddr_in> ParseAddress(const std::string& text) {
  const size_t colon = text.rfind(':');
  sockaddr_in address{};
  address.sin_family = AF_INET;
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(text.substr(colon + 1), &port) ||
      port > 65535 || inet_pton(AF_INET, text.substr(0, colon).c_str(), &address.sin_addr) != 1) {
    return std::nullopt;
  }
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

// A connected socket.
absl::StatusOr<int> Connect(const std::string& target, const std::string& source) {
  const auto address = ParseAddress(target);
  if (!address) return absl::InvalidArgumentError(absl::StrCat(target, " is not IPV4:PORT"));
  const auto failed = [&](const char* what) {
    return absl::UnavailableError(
        absl::StrCat(what, " ", target, ": ", absl::ErrnoToStatus(errno, source).message()));
  };
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return failed("no socket for");
  absl::Cleanup closer = [fd] { close(fd); };
  if (!source.empty()) {
    const auto from = ParseAddress(absl::StrCat(source, ":0"));
    if (!from || bind(fd, reinterpret_cast<const sockaddr*>(&*from), sizeof(*from)) != 0) {
      return failed("cannot take the source address to");
    }
  }
  if (connect(fd, reinterpret_cast<const sockaddr*>(&*address), sizeof(*address)) != 0) {
    return failed("cannot connect to");
  }
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  if (fcntl(fd, F_SETFL, O_NONBLOCK) != 0) return failed("cannot use the connection to");
  std::move(closer).Cancel();
  return fd;
}

}  // namespace

absl::StatusOr<std::shared_ptr<client::PrefillClient>> Peer::Client() {
  std::lock_guard lock(mutex_);
  if (client_ == nullptr) {
    const auto fd = Connect(target_, source_);
    if (!fd.ok()) return fd.status();
    client_ =
        std::make_shared<client::PrefillClient>(grpc::CreateInsecureChannelFromFd(target_, *fd));
  }
  return client_;
}

void Peer::Drop(const std::shared_ptr<client::PrefillClient>& client) {
  std::lock_guard lock(mutex_);
  if (client_ == client && !target_.empty()) client_ = nullptr;
}

absl::StatusOr<std::vector<std::unique_ptr<Peer>>> MakePeers(const std::string& target,
                                                             size_t count) {
  const auto address = ParseAddress(target);
  if (!address) {
    return absl::InvalidArgumentError(
        absl::StrCat("--peers needs a --target of IPV4:PORT, not ", target));
  }
  const bool loopback = ntohl(address->sin_addr.s_addr) >> 24 == 127;
  std::vector<std::unique_ptr<Peer>> peers;
  for (size_t i = 0; i < count; ++i) {
    std::string source;
    if (loopback) {
      const in_addr from = {htonl(kFirstSource + static_cast<uint32_t>(i))};
      char text[INET_ADDRSTRLEN];
      source = inet_ntop(AF_INET, &from, text, sizeof(text));
    }
    peers.push_back(std::make_unique<Peer>(target, source));
  }
  return peers;
}

}  // namespace prefilld::cli
