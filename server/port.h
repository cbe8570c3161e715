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
  // Binds and does not listen, so who connects is refused. UNAVAILABLE says why it cannot. A host
  // that is 0.0.0.0 or [::] means every address of both kinds, where there are both.
  static absl::StatusOr<HeldPort> Take(const Endpoint& endpoint);
  HeldPort(HeldPort&& other) noexcept
      : endpoint_(std::move(other.endpoint_)),
        sockets_(std::move(other.sockets_)),
        name_(std::exchange(other.name_, -1)) {}
  HeldPort& operator=(HeldPort&& other) noexcept {
    std::swap(endpoint_, other.endpoint_);
    std::swap(sockets_, other.sockets_);
    std::swap(name_, other.name_);
    return *this;
  }
  ~HeldPort();

  // From now on the system takes connections; accept does not block. UNAVAILABLE: somebody else
  // listens on one of the addresses.
  absl::Status Listen();

  const Endpoint& endpoint() const { return endpoint_; }        // with the real port
  const std::vector<int>& sockets() const { return sockets_; }  // one an address of the host

 private:
  explicit HeldPort(Endpoint endpoint) : endpoint_(std::move(endpoint)) {}
  void Add(int fd);

  Endpoint endpoint_;
  std::vector<int> sockets_;
  int name_ = -1;  // says to others that the port is held
};

}  // namespace prefilld
