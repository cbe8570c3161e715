#include "server/transport/descriptor_socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/record/log.h"

namespace prefilld {
namespace {

constexpr absl::Duration kAcceptAgain = absl::Milliseconds(100);
constexpr absl::Duration kWarnAgain = absl::Minutes(1);
constexpr int kAcceptsAtOnce = 64;
constexpr int kBacklog = 128;

bool Abstract(const std::string& address) { return address[0] == '@'; }

struct SocketAddress {
  sockaddr_un name{};
  socklen_t bytes = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

absl::StatusOr<SocketAddress> AddressOf(const std::string& text) {
  SocketAddress address;
  address.name.sun_family = AF_UNIX;
  const size_t most = sizeof address.name.sun_path - 1;
  if (text.size() < 2 || (text[0] != '/' && !Abstract(text))) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is neither an absolute path nor @NAME"));
  }
  if (text.size() > most) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' has ", text.size(), " bytes, the limit is ", most));
  }
  std::memcpy(address.name.sun_path, text.data(), text.size());
  if (Abstract(text)) address.name.sun_path[0] = '\0';
  address.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + text.size() +
                                         (Abstract(text) ? 0 : 1));
  return address;
}

int NewSocket() { return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

absl::Status Impossible(const std::string& address, const char* what) {
  return absl::FailedPreconditionError(
      absl::StrCat("'", address, "': ", what, ": ", std::strerror(errno)));
}

// Whoever replaces a path has its directory meanwhile: of two that find it stale, the second finds
// the first one's.
class HeldDirectory {
 public:
  explicit HeldDirectory(const std::string& path) {
    const std::string directory = path.substr(0, std::max<size_t>(path.rfind('/'), 1));
    fd_ = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int tries = 0; fd_ >= 0 && flock(fd_, LOCK_EX | LOCK_NB) != 0; ++tries) {
      if (tries == 100) return;
      absl::SleepFor(absl::Milliseconds(10));
    }
    held_ = fd_ >= 0;
  }
  ~HeldDirectory() {
    if (fd_ >= 0) close(fd_);
  }
  bool held() const { return held_; }

 private:
  int fd_;
  bool held_ = false;
};

// What is left of a dead owner goes; anything else stays, and bind says so.
absl::Status RemoveStale(const std::string& path, const SocketAddress& address) {
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  const int probe = NewSocket();
  if (probe < 0) return Impossible(path, "socket");
  // A living one that is flooded has no place in its backlog.
  const int error = connect(probe, address.get(), address.bytes) == 0 ? EAGAIN : errno;
  close(probe);
  if (!S_ISSOCK(info.st_mode) || error != ECONNREFUSED) {
    return absl::FailedPreconditionError(
        absl::StrCat("'", path, "' is in use",
                     !S_ISSOCK(info.st_mode) ? ", and no socket"
                     : error == EAGAIN       ? " by a living server"
                                             : absl::StrCat(": ", std::strerror(error))));
  }
  unlink(path.c_str());
  return absl::OkStatus();
}

absl::Status Bind(const std::string& address, int fd) {
  auto bound = AddressOf(address);
  if (!bound.ok()) return bound.status();
  std::optional<HeldDirectory> held;
  if (!Abstract(address)) {
    if (!held.emplace(address).held()) return Impossible(address, "its directory");
    if (absl::Status status = RemoveStale(address, *bound); !status.ok()) return status;
  }
  if (bind(fd, bound->get(), bound->bytes) != 0) return Impossible(address, "bind");
  // Nobody can connect before there is a backlog.
  if (!Abstract(address) && chmod(address.c_str(), 0600) != 0) return Impossible(address, "chmod");
  return listen(fd, kBacklog) == 0 ? absl::OkStatus() : Impossible(address, "listen");
}

// One message: a size, and a descriptor or what is to be said.
bool Send(int to, uint64_t bytes, int descriptor, absl::string_view text) {
  unsigned char size[8];
  for (int i = 0; i < 8; ++i) size[i] = static_cast<unsigned char>(bytes >> (8 * i));
  iovec parts[] = {{size, sizeof size}, {const_cast<char*>(text.data()), text.size()}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = text.empty() ? 1 : 2;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof descriptor)] = {};
  if (descriptor >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof descriptor);
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof descriptor);
  }
  return sendmsg(to, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

// The last word to a peer. What it has said and we have not read would reach it as an error, before
// what we say.
void Refuse(int peer, absl::string_view why) {
  (void)Send(peer, 0, -1, why);
  shutdown(peer, SHUT_RD);
  for (char said; recv(peer, &said, 1, MSG_DONTWAIT) > 0;) {
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<DescriptorSocket>> DescriptorSocket::Listen(Options options) {
  const int listener = NewSocket();
  const int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  absl::Status status = listener < 0 || bell < 0
                            ? absl::UnavailableError(absl::StrCat("socket: ", strerror(errno)))
                            : Bind(options.address, listener);
  if (!status.ok()) {
    if (listener >= 0) close(listener);
    if (bell >= 0) close(bell);
    return status;
  }
  return std::unique_ptr<DescriptorSocket>(
      new DescriptorSocket(std::move(options), listener, bell));
}

DescriptorSocket::DescriptorSocket(Options options, int listener, int bell)
    : options_(std::move(options)), bell_(bell), listener_(listener) {
  struct stat info;
  if (!Abstract(options_.address) && lstat(options_.address.c_str(), &info) == 0) {
    path_device_ = info.st_dev;
    path_inode_ = info.st_ino;
  }
  thread_ = std::thread([this] { Loop(); });
}

DescriptorSocket::~DescriptorSocket() {
  stopping_ = true;
  Close();
  thread_.join();
  while (!connections_.empty()) HangUp(connections_.begin());
  releasers_.Stop();
  close(bell_);
}

void DescriptorSocket::Close() {
  closed_ = true;
  (void)eventfd_write(bell_, 1);
  if (unlinked_.exchange(true)) return;
  struct stat info;  // it may be somebody else's by now
  if (!Abstract(options_.address) && lstat(options_.address.c_str(), &info) == 0 &&
      info.st_dev == path_device_ && info.st_ino == path_inode_) {
    unlink(options_.address.c_str());
  }
}

absl::Duration DescriptorSocket::UntilDeadline() const {
  absl::Duration least = absl::InfiniteDuration();
  if (listener_ >= 0 && accept_from_ > SteadyNow()) least = -Since(accept_from_);
  for (const Connection& connection : connections_) {
    if (connection.named) continue;
    least = std::min(least, options_.name_timeout - Since(connection.since));
  }
  return std::max(least, absl::ZeroDuration());
}

void DescriptorSocket::Loop() {
  std::vector<pollfd> polled;
  while (!stopping_) {
    if (closed_ && listener_ >= 0) close(std::exchange(listener_, -1));
    polled = {{bell_, POLLIN, 0}, {accept_from_ > SteadyNow() ? -1 : listener_, POLLIN, 0}};
    for (const Connection& connection : connections_) {
      // Of who was answered only the end is of interest.
      polled.push_back({connection.fd, connection.named ? short{0} : short{POLLIN}, 0});
    }
    const absl::Duration wait = absl::Ceil(UntilDeadline(), absl::Milliseconds(1));
    const int64_t ms = wait == absl::InfiniteDuration() ? -1 : absl::ToInt64Milliseconds(wait);
    poll(polled.data(), polled.size(), static_cast<int>(ms));
    if (eventfd_t rung; polled[0].revents != 0) (void)eventfd_read(bell_, &rung);
    auto next = connections_.begin();
    for (size_t i = 2; i < polled.size(); ++i) {
      const auto connection = next++;
      const bool ended = (polled[i].revents & (POLLHUP | POLLERR | POLLNVAL)) != 0;
      if (!connection->named && (polled[i].revents & POLLIN) != 0) {
        if (!Answer(*connection)) HangUp(connection);
      } else if (ended) {
        HangUp(connection);
      } else if (!connection->named && Since(connection->since) >= options_.name_timeout) {
        options_.told(Outcome::kSilent);
        HangUp(connection);
      }
    }
    if (polled[1].revents != 0) AcceptAll();
  }
  if (listener_ >= 0) close(std::exchange(listener_, -1));
}

void DescriptorSocket::AcceptAll() {
  for (int i = 0; i < kAcceptsAtOnce && !closed_; ++i) {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
      if (!Admit(fd)) close(fd);
      continue;
    }
    if (errno == EAGAIN) return;
    if (errno == EINTR || errno == ECONNABORTED) continue;
    // Who comes waits in the backlog.
    WarnOf(absl::StrCat("accept: ", std::strerror(errno)));
    accept_from_ = SteadyNow() + kAcceptAgain;
    return;
  }
}

bool DescriptorSocket::Admit(int fd) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return false;
  if (peer.uid != geteuid() && peer.uid != 0) {
    const std::string why =
        absl::StrCat("user ", peer.uid, " is neither the server's ", geteuid(), " nor root");
    options_.told(Outcome::kPeer);
    WarnOf(why);
    Refuse(fd, why);
    return false;
  }
  auto taken = unnamed_ < kUnnamedMax ? options_.connections.Take() : nullptr;
  if (taken == nullptr) {
    const std::string why = absl::StrCat(options_.connections.used(), " connections, ", unnamed_,
                                         " without a name; the limits are ",
                                         options_.connections.limit(), " and ", kUnnamedMax);
    options_.told(Outcome::kFull);
    WarnOf(why);
    Refuse(fd, why);
    return false;
  }
  ++unnamed_;
  connections_.push_back({.fd = fd, .since = SteadyNow(), .taken = std::move(taken)});
  return true;
}

bool DescriptorSocket::Answer(Connection& connection) {
  char said[kNameBytesMax + 1];  // descriptors that come along are dropped by the kernel
  const ssize_t bytes = recv(connection.fd, said, sizeof said, MSG_DONTWAIT);
  if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (bytes <= 0) return false;
  DescriptorSocket::Handout handout = options_.find(std::string(said, static_cast<size_t>(bytes)));
  connection.share = std::move(handout.share);  // whatever follows: this thread never has the last
  const absl::StatusOr<int>& descriptor = handout.descriptor;
  if (!descriptor.ok()) {
    const bool unknown = absl::IsNotFound(descriptor.status());
    options_.told(unknown ? Outcome::kUnknown : Outcome::kFailed);
    if (!unknown) WarnOf(descriptor.status().message());
    Refuse(connection.fd, descriptor.status().message());
    return false;
  }
  const bool sent = Send(connection.fd, handout.bytes, *descriptor, "");
  if (!sent) WarnOf(absl::StrCat("sendmsg: ", std::strerror(errno)));
  close(*descriptor);
  options_.told(sent ? Outcome::kGiven : Outcome::kFailed);
  if (!sent) return false;
  connection.named = true;
  --unnamed_;
  return true;
}

void DescriptorSocket::HangUp(Connections::iterator connection) {
  close(connection->fd);
  unnamed_ -= connection->named ? 0 : 1;
  releasers_.Post(
      [taken = std::move(connection->taken), share = std::move(connection->share)]() mutable {
        share.reset();
        taken.reset();
      });
  connections_.erase(connection);
}

void DescriptorSocket::WarnOf(absl::string_view message) {
  if (Since(warned_) < kWarnAgain) return;
  warned_ = SteadyNow();
  Log(Level::kWarning, "descriptor_refused",
      {{"socket", options_.address}, {"message", std::string(message)}});
}

}  // namespace prefilld
