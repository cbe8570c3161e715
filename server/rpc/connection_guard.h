// Looks after what connections do once gRPC has them, in gRPC's own counters (channelz): one that
// has more streams open than it was told it may, or takes back calls as fast as it begins them,
// costs others more than it is worth and is cut off. Some of that no call of ours would show: gRPC
// hands over a call with its whole request, and serves health by itself. Gives memory back to the
// system after a peak, too. Owns a thread.
#pragma once

#include <cstdint>
#include <thread>
#include <unordered_map>

#include "absl/time/time.h"
#include "server/clock.h"
#include "server/rpc/acceptor.h"

namespace prefilld {

struct GuardOptions {
  int64_t streams = 128;               // what a connection is told that it may have open at a time
  double resets_per_second = 500;      // calls that it may take back, in the long run
  static constexpr double kBurst = 2;  // seconds of them at once
  absl::Duration every = absl::Milliseconds(250);
};

class ConnectionGuard {
 public:
  // Of the server that this process has started last.
  ConnectionGuard(GuardOptions options, Acceptor& acceptor);
  ~ConnectionGuard();

 private:
  struct Seen {
    int64_t failed = 0;  // streams, when it was looked at
    double tokens = 0;
    SteadyTime at;
  };

  void Loop();
  void Look();
  const char* Against(int64_t socket, int64_t open, int64_t failed);  // null: nothing
  void GiveBackMemory();

  const GuardOptions options_;
  Acceptor& acceptor_;
  // The thread's.
  const int64_t server_;                    // gRPC's id of it
  int64_t calls_looked_at_ = 0;             // begun by then
  std::unordered_map<int64_t, Seen> seen_;  // connections, by gRPC's id
  SteadyTime trimmed_ = SteadyNow();
  Bell stopping_;
  std::thread thread_;
};

}  // namespace prefilld
