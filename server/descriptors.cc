#include "server/descriptors.h"

#include <sys/resource.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

// The log, listeners, HTTP's connections, gRPC's and the device's own, and what libraries open.
constexpr int kOwn = 256;
constexpr int kConnectionsMax = 16384;
constexpr int kSegmentsMax = 4096;
constexpr int kMemoryMax = 4096;

}  // namespace

std::shared_ptr<void> DescriptorShare::Take() const {
  int used = *used_;
  do {
    if (used >= limit_) return nullptr;
  } while (!used_->compare_exchange_weak(used, used + 1));
  return {used_.get(), [used_by = used_](void*) { --*used_by; }};
}

absl::StatusOr<DescriptorShares> ShareDescriptors(int limit, std::optional<int> connections) {
  const int shared = limit - std::min(kOwn, limit / 2);
  const int segments = std::min(kSegmentsMax, shared / 4);
  const int memory = std::min(kMemoryMax, shared / 4);
  const int rest = shared - segments - memory;
  if (connections.value_or(0) > rest) {
    return absl::InvalidArgumentError(
        absl::StrCat(*connections, " are more than the ", rest,
                     " that the limit of descriptors (ulimit -Hn: ", limit, ") allows"));
  }
  return DescriptorShares{connections.value_or(std::min(kConnectionsMax, rest)),
                          DescriptorShare(segments), DescriptorShare(memory)};
}

int DescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 1024;
  return static_cast<int>(std::min<rlim_t>(limit.rlim_cur, 1 << 20));
}

}  // namespace prefilld
