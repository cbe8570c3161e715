// Accepts connections for gRPC, which gives up its own listener for ever when accept fails once.
// What a peer can have of them is bounded: in all, of one source address at a time, and how fast
// new ones of one address come. What is refused is closed at once, with a reset.
//
// Owned by GrpcServer. One thread accepts and waits for nobody; out of descriptors, or of memory,
// it refuses what comes and goes on. gRPC owns what was handed over and tells nobody when it closes
// one: the thread looks, by the identity of the socket behind the number, once a second and before
// a limit refuses. So no descriptor more than gRPC's is needed, and none is held open.
#pragma once

#include <netinet/in.h>
#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/record/metrics.h"

namespace prefilld {

struct ConnectionLimits {
  int connections = 1024;              // open at a time
  int per_address = 512;               // of these, of one source; of IPv6 a /64 is one source
  double new_per_second = 200;         // of one source, in the long run
  static constexpr double kBurst = 5;  // seconds of it that may come at once
};

class Acceptor {
 public:
  // Takes over a connection that does not block.
  using Serve = std::function<void(int listener, int fd)>;

  // Sockets that listen and do not block; they are the caller's, and outlive it. Accepts nobody
  // before Start.
  Acceptor(std::vector<int> listeners, ConnectionLimits limits, Serve serve, Metrics& metrics);
  ~Acceptor() { Stop(); }
  void Start();
  // Nothing is handed over afterwards. Waits for the thread.
  void Stop();

  // The next connection from exactly this address is the server's own, and under no limit.
  void Expect(const sockaddr_storage& self);
  // Whether the connection of a peer (grpc::ServerContext::peer()'s words) is open at both ends.
  bool Connected(const std::string& peer);
  // Ends the connection of a peer (grpc::ServerContext::peer()'s words), which pays for it with the
  // new ones that its address may have in the next seconds.
  void Cut(const std::string& peer, const char* why);

 private:
  using Source = std::array<uint8_t, 16>;  // an IPv6 address; IPv4 is mapped
  struct Socket {
    dev_t device = 0;
    ino_t inode = 0;
    bool operator==(const Socket& other) const {
      return device == other.device && inode == other.inode;
    }
  };
  struct Connection {
    Socket socket;
    Source source;
    std::string peer;
    bool counted = false;  // among those of its source
  };
  struct PerSource {
    int live = 0;
    double tokens = 0;
    SteadyTime at;  // of the tokens
  };

  static std::optional<Socket> Behind(int fd);
  void Loop();
  void AcceptAll(int listener);
  bool OnError(int listener, int error);  // false: it accepts nothing for a while
  void Take(int listener, int fd, const sockaddr_storage& address);
  void Refuse(int fd, const char* reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Sweep() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // By grpc::ServerContext::peer()'s words.
  std::unordered_map<int, Connection>::iterator Find(const std::string& peer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Forget(std::unordered_map<int, Connection>::iterator connection)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const char* Against(const Source& source) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Refill(PerSource& source) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::vector<int> listeners_;
  const ConnectionLimits limits_;
  const Serve serve_;
  Metrics& metrics_;
  const int bell_;  // an eventfd
  std::atomic<bool> stopping_{false};
  // The thread's.
  int reserve_;  // given up for a moment to refuse who comes when there are no others
  SteadyTime warned_ = absl::InfinitePast();

  absl::Mutex mutex_;
  std::unordered_map<int, Connection> connections_ ABSL_GUARDED_BY(mutex_);  // by descriptor
  std::unordered_map<std::string, int> by_peer_ ABSL_GUARDED_BY(mutex_);     // of connections_
  absl::flat_hash_map<Source, PerSource> sources_ ABSL_GUARDED_BY(mutex_);
  SteadyTime swept_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  std::string expected_ ABSL_GUARDED_BY(mutex_);  // a peer
  std::thread thread_;
};

}  // namespace prefilld
