// The HTTP port for people and scrapers: GET and HEAD of pages.h, one request a connection, under
// the server's TLS where it has one. One thread polls and answers, and waits for no peer: a request
// has a time to be there, its handshake too, and an answer one to be taken, and of many connections
// the oldest goes for a new one.
#pragma once

#include <list>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/http_stream.h"
#include "server/pages.h"
#include "server/port.h"
#include "server/rpc/tls_files.h"

namespace prefilld {

class HttpServer {
 public:
  // UNAVAILABLE when the address cannot be listened on. tls: null: in the clear; outlives it.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const Endpoint& listen,
                                                           const Pages& pages, const TlsFiles* tls);
  ~HttpServer();  // hangs up on everybody

  const Endpoint& endpoint() const { return port_.endpoint(); }  // with the real port

 private:
  struct Connection {
    Connection(int fd, std::shared_ptr<const TlsFiles::Pem> pem)
        : tls(std::move(pem)), stream(fd, tls ? tls->context.get() : nullptr) {}

    const std::shared_ptr<const TlsFiles::Pem> tls;
    HttpStream stream;
    const SteadyTime since = SteadyNow();
    std::string request;  // as it arrives
    std::string answer;
    size_t sent = 0;                                          // of it
    size_t discarded = 0;                                     // of what came after the request
    enum { kReading, kAnswering, kEnding } state = kReading;  // kEnding: until the peer has it all
  };

  HttpServer(HeldPort port, const Pages& pages, const TlsFiles* tls);
  void Loop();
  void AcceptAll(int listener);
  // False: it is to be closed.
  bool Read(Connection& connection);
  bool Send(Connection& connection);
  std::string AnswerTo(const std::string& request, const HttpStream& stream);
  HttpAnswer Debug(absl::string_view target, const Credentials& credentials);

  const HeldPort port_;
  const Pages pages_;
  const TlsFiles* const tls_;
  const int bell_;  // an eventfd
  // The thread's.
  SteadyTime accept_from_ = absl::InfinitePast();  // after the system had no descriptor for us
  SteadyTime debug_from_ = absl::InfinitePast();   // the next debug page
  std::list<Connection> connections_;              // the oldest first
  std::thread thread_;
};

}  // namespace prefilld
