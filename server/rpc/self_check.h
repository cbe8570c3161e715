// Looks from outside whether the gRPC port serves: connects to it as a client does and waits for
// the first words of HTTP/2, or of TLS. To connect alone says nothing, the system does that for a
// port at which nobody accepts. Owns a thread.
#pragma once

#include <functional>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/rpc/acceptor.h"

namespace prefilld {

struct SelfCheckOptions {
  int listener = -1;  // a socket that listens, of another's; its address is connected to
  bool tls = false;
  absl::Duration every = absl::Seconds(5);
  absl::Duration timeout = absl::Seconds(3);  // of each step: connect, handshake, answer
  int failures = 3;                           // in a row, before it is told
};

// Once; blocks. `expect` hears from which address it will connect.
absl::Status CheckPort(const SelfCheckOptions& options,
                       const std::function<void(const sockaddr_storage&)>& expect);

class SelfCheck {
 public:
  // tell: why the port does not serve, or OK when it does again; on each change.
  SelfCheck(SelfCheckOptions options, Acceptor& acceptor,
            std::function<void(const absl::Status&)> tell);
  ~SelfCheck();

 private:
  void Loop();

  const SelfCheckOptions options_;
  Acceptor& acceptor_;
  const std::function<void(const absl::Status&)> tell_;
  Bell stopping_;
  std::thread thread_;
};

}  // namespace prefilld
