#include "server/http.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace prefilld {
namespace {

constexpr size_t kConnections = 128;
constexpr size_t kRequestBytes = 8192;
constexpr absl::Duration kRequestTime = absl::Seconds(5);  // from the connection on, as is
constexpr absl::Duration kAnswerTime = absl::Seconds(30);
constexpr absl::Duration kLook = absl::Milliseconds(500);
constexpr size_t kDiscardedBytes = 64 << 10;  // of who talks on after its answer
constexpr int kDebugShare = 4;                // debug pages have one part in so many of the thread
constexpr absl::Duration kAcceptAgain = absl::Milliseconds(100);

// The value of a header; empty where it is there more than once.
std::optional<std::string> HeaderOf(const std::string& request, absl::string_view name) {
  std::optional<std::string> value;
  for (const absl::string_view line : absl::StrSplit(request, "\r\n")) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(line, absl::MaxSplits(':', 1));
    if (!absl::EqualsIgnoreCase(parts.first, name)) continue;
    value = value ? "" : std::string(absl::StripAsciiWhitespace(parts.second));
  }
  return value;
}

Credentials CredentialsOf(const std::string& request, const HttpStream& stream) {
  return {.certificate = stream.CertificateNames(),
          .authorization = HeaderOf(request, "authorization"),
          .tenant = HeaderOf(request, "prefilld-tenant"),
          .tls = stream.is_tls(),
          .uncertified = stream.is_uncertified(),
          .peer = stream.peer()};
}

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const Endpoint& listen,
                                                              const Pages& pages,
                                                              const TlsFiles* tls) {
  auto port = HeldPort::Take(listen);
  if (!port.ok()) return port.status();
  if (absl::Status status = port->Listen(); !status.ok()) return status;
  return std::unique_ptr<HttpServer>(new HttpServer(*std::move(port), pages, tls));
}

HttpServer::HttpServer(HeldPort port, const Pages& pages, const TlsFiles* tls)
    : port_(std::move(port)),
      pages_(pages),
      tls_(tls),
      bell_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      thread_([this] { Loop(); }) {}

HttpServer::~HttpServer() {
  const uint64_t one = 1;
  (void)!write(bell_, &one, sizeof one);
  thread_.join();
  close(bell_);
}

void HttpServer::Loop() {
  sigset_t pipe;  // OpenSSL writes to who has hung up
  sigemptyset(&pipe);
  sigaddset(&pipe, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
  for (;;) {
    std::vector<pollfd> polled = {{bell_, POLLIN, 0}};
    const bool accepts = SteadyNow() >= accept_from_;
    for (const int listener : port_.sockets()) {
      polled.push_back({accepts ? listener : -1, POLLIN, 0});
    }
    for (const Connection& connection : connections_) {
      const bool sends = connection.state == Connection::kAnswering;
      const HttpStream& stream = connection.stream;
      polled.push_back({stream.fd(), stream.wants(sends ? POLLOUT : POLLIN), 0});
    }
    const bool idle = connections_.empty() && accepts;
    poll(polled.data(), polled.size(), idle ? -1 : static_cast<int>(kLook / absl::Milliseconds(1)));
    if (polled[0].revents != 0) return;
    size_t at = 1 + port_.sockets().size();
    for (auto next = connections_.begin(); next != connections_.end(); ++at) {
      const auto connection = next++;
      const bool reads = connection->state == Connection::kReading;
      bool lives = Since(connection->since) < (reads ? kRequestTime : kAnswerTime);
      if (lives && polled[at].revents != 0) {
        lives = connection->state == Connection::kAnswering ? Send(*connection) : Read(*connection);
      }
      if (!lives) connections_.erase(connection);
    }
    for (size_t i = 0; i < port_.sockets().size(); ++i) {
      if (polled[1 + i].revents != 0) AcceptAll(port_.sockets()[i]);
    }
  }
}

void HttpServer::AcceptAll(int listener) {
  for (size_t i = 0; i < kConnections; ++i) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0) {
      if (errno != EAGAIN) accept_from_ = SteadyNow() + kAcceptAgain;
      return;
    }
    if (connections_.size() >= kConnections) connections_.pop_front();
    connections_.emplace_back(fd, tls_ == nullptr ? nullptr : tls_->current());
    if (!Read(connections_.back())) connections_.pop_back();  // most have said it all by now
  }
}

bool HttpServer::Read(Connection& connection) {
  HttpStream& stream = connection.stream;
  do {
    char bytes[4096];
    const ssize_t count = stream.Read(bytes, sizeof bytes);
    if (count < 0) return true;
    if (count == 0) {
      if (!stream.failure().empty()) {
        pages_.access.HandshakeFailed("http", stream.peer(), stream.failure());
      }
      return false;
    }
    if (connection.state == Connection::kEnding) {
      connection.discarded += static_cast<size_t>(count);
      if (connection.discarded > kDiscardedBytes) return false;
      continue;
    }
    std::string& request = connection.request;
    request.append(bytes, static_cast<size_t>(count));
    if (absl::StrContains(request, "\r\n\r\n") || request.size() >= kRequestBytes) {
      connection.answer = AnswerTo(std::exchange(request, {}), stream);
      connection.state = Connection::kAnswering;
      return Send(connection);
    }
  } while (stream.pending());
  return true;
}

bool HttpServer::Send(Connection& connection) {
  const absl::string_view rest = absl::string_view(connection.answer).substr(connection.sent);
  const ssize_t count = connection.stream.Write(rest.data(), rest.size());
  if (count <= 0) return count < 0;
  connection.sent += static_cast<size_t>(count);
  if (connection.sent < connection.answer.size()) return true;
  connection.state = Connection::kEnding;
  return connection.stream.EndWriting();
}

// Debug pages may be large: whoever asks for them again and again leaves the thread to the others.
HttpAnswer HttpServer::Debug(absl::string_view target, const Credentials& credentials) {
  const SteadyTime begin = SteadyNow();
  if (begin < debug_from_) {
    return {.status = "429 Too Many Requests\r\nRetry-After: 1", .body = "again in a moment\n"};
  }
  HttpAnswer answer = Show(pages_, target, credentials);
  debug_from_ = SteadyNow() + (kDebugShare - 1) * Since(begin);
  return answer;
}

std::string HttpServer::AnswerTo(const std::string& request, const HttpStream& stream) {
  const absl::string_view line = absl::string_view(request).substr(0, request.find("\r\n"));
  const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
  const bool whole = absl::StrContains(request, "\r\n\r\n") && words.size() == 3 &&
                     absl::StartsWith(words[2], "HTTP/1.");
  HttpAnswer answer;
  if (!whole) {
    answer = {.status = "400 Bad Request", .body = "no HTTP/1.1 request of 8 KiB at most\n"};
  } else if (words[0] != "GET" && words[0] != "HEAD") {
    answer = {.status = "405 Method Not Allowed\r\nAllow: GET, HEAD", .body = "GET and HEAD\n"};
  } else {
    const Credentials credentials = CredentialsOf(request, stream);
    answer = absl::StartsWith(words[1], "/debug/") ? Debug(words[1], credentials)
                                                   : Show(pages_, words[1], credentials);
  }
  const bool body = !whole || words[0] != "HEAD";
  return absl::StrCat("HTTP/1.1 ", answer.status, "\r\nContent-Type: ", answer.type,
                      "\r\nContent-Length: ", answer.body.size(), "\r\nConnection: close\r\n\r\n",
                      body ? answer.body : "");
}

}  // namespace prefilld
