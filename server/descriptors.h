// What the descriptors of the process are spent on. Each kind has a share of its own, so that none
// of them can keep the others from one; what is over belongs to the process itself.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"

namespace prefilld {

// Thread-safe; copies are the same share.
class DescriptorShare {
 public:
  explicit DescriptorShare(int limit = std::numeric_limits<int>::max()) : limit_(limit) {}

  // One of them, back when the last holder goes; null when there is none left.
  std::shared_ptr<void> Take() const;
  int used() const { return *used_; }
  int limit() const { return limit_; }

 private:
  int limit_;
  std::shared_ptr<std::atomic<int>> used_ = std::make_shared<std::atomic<int>>(0);
};

struct DescriptorShares {
  int connections = 0;       // of gRPC; the acceptor counts them
  DescriptorShare segments;  // posix_shm: one each, as long as it lives
  DescriptorShare memory;    // connections to the socket that hands out memory: one for each peer
                             // of a region, as long as it has it open
};

// Of `limit` (RLIMIT_NOFILE) descriptors. connections: as many, if that is possible
// (INVALID_ARGUMENT says how many are); absent: most of what there is, at most 16,384.
absl::StatusOr<DescriptorShares> ShareDescriptors(int limit, std::optional<int> connections);

int DescriptorLimit();  // of this process, as it is

}  // namespace prefilld
