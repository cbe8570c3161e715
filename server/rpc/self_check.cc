#include "server/rpc/self_check.h"

#include <netinet/in.h>
#include <openssl/bio.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

constexpr char kHello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";  // and no SETTINGS
constexpr size_t kFrameHeader = 9;
constexpr char kSettings = 4;
constexpr size_t kRecordHeader = 5;  // of TLS
constexpr char kHandshake = 22;

absl::Status Failed(const char* what) {
  const bool late = errno == EAGAIN || errno == EINPROGRESS;
  return absl::UnavailableError(
      absl::StrCat(what, ": ", late ? "no answer in time" : std::strerror(errno)));
}

// Where a client on this host finds the listener; and any address of its kind to come from.
absl::Status AddressOf(int listener, sockaddr_storage* to, sockaddr_storage* from) {
  socklen_t bytes = sizeof *to;
  if (getsockname(listener, reinterpret_cast<sockaddr*>(to), &bytes) != 0) return Failed("address");
  if (to->ss_family == AF_INET) {
    auto& v4 = reinterpret_cast<sockaddr_in&>(*to);
    if (v4.sin_addr.s_addr == htonl(INADDR_ANY)) v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  } else {
    auto& v6 = reinterpret_cast<sockaddr_in6&>(*to);
    if (IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr)) v6.sin6_addr = in6addr_loopback;
  }
  *from = *to;
  reinterpret_cast<sockaddr_in&>(*from).sin_port = 0;  // where sin6_port is too
  return absl::OkStatus();
}

absl::Status IsSettings(const char* frame, ssize_t bytes) {
  if (bytes < 0) return Failed("HTTP/2");
  if (bytes < static_cast<ssize_t>(kFrameHeader) || frame[3] != kSettings) {
    return absl::UnavailableError(absl::StrCat("HTTP/2: ", bytes, " bytes that are no SETTINGS"));
  }
  return absl::OkStatus();
}

absl::Status Plain(int fd) {
  if (send(fd, kHello, sizeof kHello - 1, MSG_NOSIGNAL) < 0) return Failed("HTTP/2");
  char frame[kFrameHeader];
  return IsSettings(frame, recv(fd, frame, sizeof frame, MSG_WAITALL));
}

// Up to the server's hello. To go on needs a certificate where clients do, and a handshake that
// fails would be told of as some stranger's.
absl::Status Tls(int fd) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_client_method()),
                                                                  SSL_CTX_free);
  const std::unique_ptr<SSL, decltype(&SSL_free)> ssl(SSL_new(context.get()), SSL_free);
  constexpr unsigned char kHttp2[] = "\x02h2";
  SSL_set_alpn_protos(ssl.get(), kHttp2, sizeof kHttp2 - 1);
  BIO* const out = BIO_new(BIO_s_mem());
  SSL_set_bio(ssl.get(), BIO_new(BIO_s_mem()), out);
  SSL_connect(ssl.get());  // as far as it gets without an answer
  char* hello = nullptr;
  const long bytes = BIO_get_mem_data(out, &hello);
  if (send(fd, hello, static_cast<size_t>(bytes), MSG_NOSIGNAL) != bytes) return Failed("TLS");
  char record[kRecordHeader];
  const ssize_t answered = recv(fd, record, sizeof record, MSG_WAITALL);
  if (answered < 0) return Failed("TLS");
  if (answered < static_cast<ssize_t>(kRecordHeader) || record[0] != kHandshake) {
    return absl::UnavailableError(absl::StrCat("TLS: ", answered, " bytes that are no handshake"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckPort(const SelfCheckOptions& options,
                       const std::function<void(const sockaddr_storage&)>& expect) {
  sockaddr_storage to{}, from{};
  if (absl::Status status = AddressOf(options.listener, &to, &from); !status.ok()) return status;
  const int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return Failed("socket");
  const absl::Cleanup closer = [fd] { close(fd); };
  const timeval timeout = absl::ToTimeval(options.timeout);
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  const socklen_t bytes = to.ss_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  socklen_t named = sizeof from;
  if (bind(fd, reinterpret_cast<const sockaddr*>(&from), bytes) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&from), &named) != 0) {
    return Failed("bind");
  }
  if (expect) expect(from);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&to), bytes) != 0) return Failed("connect");
  return options.tls ? Tls(fd) : Plain(fd);
}

SelfCheck::SelfCheck(SelfCheckOptions options, Acceptor& acceptor,
                     std::function<void(const absl::Status&)> tell)
    : options_(options), acceptor_(acceptor), tell_(std::move(tell)), thread_([this] { Loop(); }) {}

SelfCheck::~SelfCheck() {
  stopping_.Ring();
  thread_.join();
}

void SelfCheck::Loop() {
  int failed = 0;
  while (!stopping_.Await(SteadyNow() + options_.every)) {
    const absl::Status status =
        CheckPort(options_, [this](const sockaddr_storage& address) { acceptor_.Expect(address); });
    const bool was_told = failed >= options_.failures;
    failed = status.ok() ? 0 : failed + 1;
    if ((failed >= options_.failures) != was_told) tell_(status);
  }
}

}  // namespace prefilld
