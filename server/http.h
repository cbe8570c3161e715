// The HTTP port for people and scrapers: GET and HEAD of pages.h, one request a connection. One
// thread polls and answers, and waits for no peer: a request has a time to be there and an answer
// one to be taken, and of many connections the oldest goes for a new one.
#pragma once

#include <list>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/pages.h"
#include "server/port.h"

namespace prefilld {

class HttpServer {
 public:
  // UNAVAILABLE when the address cannot be listened on.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const Endpoint& listen,
                                                           const Pages& pages);
  ~HttpServer();  // hangs up on everybody

  const Endpoint& endpoint() const { return port_.endpoint(); }  // with the real port

 private:
  struct Connection {
    int fd;
    SteadyTime since;
    std::string request;  // as it arrives
    std::string answer;
    size_t sent = 0;                                          // of it
    enum { kReading, kAnswering, kEnding } state = kReading;  // kEnding: until the peer has it all
  };

  HttpServer(HeldPort port, const Pages& pages);
  void Loop();
  void AcceptAll(int listener);
  // False: it is to be closed.
  bool Read(Connection& connection);
  bool Send(Connection& connection);
  std::string AnswerTo(const std::string& request) const;

  const HeldPort port_;
  const Pages pages_;
  const int bell_;  // an eventfd
  // The thread's.
  SteadyTime accept_from_ = absl::InfinitePast();  // after the system had no descriptor for us
  std::list<Connection> connections_;              // the oldest first
  std::thread thread_;
};

}  // namespace prefilld
