// A peer of the socket that hands out descriptors of memory, as any process may be one: it
// connects, says a name, maps what it gets, and hangs up when it goes. Fails no test by itself.
#pragma once

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

namespace prefilld {

class Importer {
 public:
  struct Answer {
    bool any = false;  // else the socket hung up, or said nothing for long
    uint64_t bytes = 0;
    int descriptor = -1;
    std::string text;
  };

  Importer() : fd_(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {}
  explicit Importer(const std::string& address) : Importer() { Connect(address); }
  Importer(Importer&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)),
        mapped_(std::exchange(other.mapped_, nullptr)),
        bytes_(other.bytes_) {}
  ~Importer() { HangUp(); }

  bool Connect(const std::string& address) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, address.data(), address.size());
    const bool abstract = address[0] == '@';
    if (abstract) name.sun_path[0] = '\0';
    const size_t bytes = offsetof(sockaddr_un, sun_path) + address.size() + (abstract ? 0 : 1);
    const timeval patience{10, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return connect(fd_, reinterpret_cast<const sockaddr*>(&name), static_cast<socklen_t>(bytes)) ==
           0;
  }
  bool Say(const std::string& name) const {
    return send(fd_, name.data(), name.size(), MSG_NOSIGNAL) >= 0;
  }
  Answer Hear() const {
    char data[512];
    iovec part{data, sizeof data};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t bytes = recvmsg(fd_, &message, MSG_CMSG_CLOEXEC);
    Answer answer;
    if (bytes < 8) return answer;
    answer.any = true;
    for (int i = 7; i >= 0; --i) answer.bytes = answer.bytes << 8 | static_cast<uint8_t>(data[i]);
    answer.text.assign(data + 8, static_cast<size_t>(bytes) - 8);
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
      std::memcpy(&answer.descriptor, CMSG_DATA(header), sizeof answer.descriptor);
    }
    return answer;
  }
  Answer Ask(const std::string& name) const { return Say(name) ? Hear() : Answer{}; }
  // The memory of that name; null where there is none to be had, or it cannot be mapped so.
  std::byte* Map(const std::string& name, int protection = PROT_READ | PROT_WRITE) {
    const Answer answer = Ask(name);
    if (answer.descriptor < 0) return nullptr;
    void* data = mmap(nullptr, answer.bytes, protection, MAP_SHARED, answer.descriptor, 0);
    close(answer.descriptor);
    if (data == MAP_FAILED) return nullptr;
    mapped_ = static_cast<std::byte*>(data);
    bytes_ = answer.bytes;
    return mapped_;
  }
  std::byte* mapped() const { return mapped_; }
  uint64_t bytes() const { return bytes_; }
  void HangUp() {
    if (mapped_ != nullptr) munmap(std::exchange(mapped_, nullptr), bytes_);
    if (fd_ >= 0) close(std::exchange(fd_, -1));
  }
  int fd() const { return fd_; }

 private:
  int fd_;
  std::byte* mapped_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace prefilld
