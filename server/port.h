// A TCP port that is kept while there is nothing to serve on it yet: what is wrong with an address
// is told before minutes of loading, and nobody else gets it meanwhile, no other prefilld either,
// but for a process of another kind that shares addresses (SO_REUSEADDR) and listens first.
#pragma once

#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/config.h"

namespace prefilld {

class HeldPort {
 public:
  // Binds and does not listen, so who connects is refused. UNAVAILABLE says why it cannot.
  static absl::StatusOr<HeldPort> Take(const Endpoint& endpoint);
  HeldPort(HeldPort&& other) noexcept : fds_(std::move(other.fds_)) {}
  HeldPort& operator=(HeldPort&& other) noexcept {
    std::swap(fds_, other.fds_);
    return *this;
  }
  // Lets go of it, once the one that listens has it: gRPC binds with SO_REUSEADDR too.
  ~HeldPort();

 private:
  HeldPort() = default;
  std::vector<int> fds_;  // one an address of the host, and one of the name
};

}  // namespace prefilld
