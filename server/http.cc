#include "server/http.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

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
constexpr absl::Duration kAcceptAgain = absl::Milliseconds(100);

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const Endpoint& listen,
                                                              const Pages& pages) {
  auto port = HeldPort::Take(listen);
  if (!port.ok()) return port.status();
  if (absl::Status status = port->Listen(); !status.ok()) return status;
  return std::unique_ptr<HttpServer>(new HttpServer(*std::move(port), pages));
}

HttpServer::HttpServer(HeldPort port, const Pages& pages)
    : port_(std::move(port)),
      pages_(pages),
      bell_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      thread_([this] { Loop(); }) {}

HttpServer::~HttpServer() {
  const uint64_t one = 1;
  (void)!write(bell_, &one, sizeof one);
  thread_.join();
  for (const Connection& connection : connections_) close(connection.fd);
  close(bell_);
}

void HttpServer::Loop() {
  for (;;) {
    std::vector<pollfd> polled = {{bell_, POLLIN, 0}};
    const bool accepts = SteadyNow() >= accept_from_;
    for (const int listener : port_.sockets()) {
      polled.push_back({accepts ? listener : -1, POLLIN, 0});
    }
    for (const Connection& connection : connections_) {
      const bool sends = connection.state == Connection::kAnswering;
      polled.push_back({connection.fd, static_cast<int16_t>(sends ? POLLOUT : POLLIN), 0});
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
      if (lives) continue;
      close(connection->fd);
      connections_.erase(connection);
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
    if (connections_.size() >= kConnections) {
      close(connections_.front().fd);
      connections_.pop_front();
    }
    connections_.push_back({.fd = fd, .since = SteadyNow()});
    Connection& connection = connections_.back();
    if (Read(connection)) continue;  // most have said it all by now
    close(fd);
    connections_.pop_back();
  }
}

bool HttpServer::Read(Connection& connection) {
  char bytes[4096];
  const ssize_t count = recv(connection.fd, bytes, sizeof bytes, 0);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (count <= 0) return false;
  if (connection.state == Connection::kEnding) return true;
  std::string& request = connection.request;
  request.append(bytes, static_cast<size_t>(count));
  if (!absl::StrContains(request, "\r\n\r\n") && request.size() < kRequestBytes) return true;
  connection.answer = AnswerTo(std::exchange(request, {}));
  connection.state = Connection::kAnswering;
  return Send(connection);
}

bool HttpServer::Send(Connection& connection) {
  const absl::string_view rest = absl::string_view(connection.answer).substr(connection.sent);
  const ssize_t count = send(connection.fd, rest.data(), rest.size(), MSG_NOSIGNAL);
  if (count < 0) return errno == EAGAIN || errno == EINTR;
  connection.sent += static_cast<size_t>(count);
  if (connection.sent < connection.answer.size()) return true;
  connection.state = Connection::kEnding;
  return shutdown(connection.fd, SHUT_WR) == 0;
}

std::string HttpServer::AnswerTo(const std::string& request) const {
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
    answer = Show(pages_, words[1]);
  }
  const bool body = !whole || words[0] != "HEAD";
  return absl::StrCat("HTTP/1.1 ", answer.status, "\r\nContent-Type: ", answer.type,
                      "\r\nContent-Length: ", answer.body.size(), "\r\nConnection: close\r\n\r\n",
                      body ? answer.body : "");
}

}  // namespace prefilld
