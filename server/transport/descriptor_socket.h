// Where descriptors of memory are handed out to other processes: a Unix socket of type
// SOCK_SEQPACKET (BufferRef in tensor.proto says what is spoken there). A peer says a name and gets
// a descriptor and a size; from then on its connection says that the memory is in use: a share of
// it is held until the peer hangs up, by itself when its process ends.
//
// Owned by the server. One thread polls and answers, and never waits for a peer; others let go of
// shares, which may take long. Peers are hostile, whoever they are: what they can hold is bounded.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/descriptors.h"
#include "server/work_pool.h"

namespace prefilld {

class DescriptorSocket {
 public:
  static constexpr int kUnnamedMax = 64;  // connections that have said no name yet
  static constexpr absl::Duration kNameTimeout = absl::Seconds(2);
  static constexpr size_t kNameBytesMax = 64;

  // What becomes of a connection, for who counts them.
  enum class Outcome { kGiven, kUnknown, kPeer, kSilent, kFull, kFailed };

  struct Handout {
    std::shared_ptr<void> share;
    uint64_t bytes = 0;
    // Closed once it is sent; NOT_FOUND where nothing has the name. What it says the peer is told.
    absl::StatusOr<int> descriptor;
  };
  struct Options {
    // A path, at most 107 bytes, or "@" and an abstract name.
    std::string address;
    std::function<Handout(const std::string& name)> find;
    std::function<void(Outcome)> told;
    absl::Duration name_timeout = kNameTimeout;
    DescriptorShare connections{1024};  // each has one until its share is gone
  };

  // Listens, and answers from now on. A path whose owner is dead is replaced; FAILED_PRECONDITION
  // when a living one has it, INVALID_ARGUMENT for an address that cannot be one.
  static absl::StatusOr<std::unique_ptr<DescriptorSocket>> Listen(Options options);
  ~DescriptorSocket();  // hangs up on everybody; waits for the shares to go

  const std::string& address() const { return options_.address; }
  // Nobody comes any more, and the path is gone; who is there stays. Any thread.
  void Close();

 private:
  struct Connection {
    int fd;
    SteadyTime since;
    bool named = false;
    std::shared_ptr<void> share;
    std::shared_ptr<void> taken;  // goes last
  };
  using Connections = std::list<Connection>;

  DescriptorSocket(Options options, int listener, int bell);
  void Loop();
  void AcceptAll();
  // False: it is to be closed.
  bool Admit(int fd);
  bool Answer(Connection& connection);
  void HangUp(Connections::iterator connection);
  absl::Duration UntilDeadline() const;
  void WarnOf(absl::string_view message);  // at most once a minute

  const Options options_;
  const int bell_;  // an eventfd
  uint64_t path_device_ = 0, path_inode_ = 0;
  std::atomic<bool> closed_{false}, stopping_{false}, unlinked_{false};
  // The thread's.
  int listener_;
  SteadyTime accept_from_ = absl::InfinitePast();  // after the system had no descriptor for us
  SteadyTime warned_ = absl::InfinitePast();
  int unnamed_ = 0;
  Connections connections_;
  // Each may wait for a step of the device.
  WorkPool releasers_{4};
  std::thread thread_;
};

}  // namespace prefilld
