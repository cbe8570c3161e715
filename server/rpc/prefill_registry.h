// The prompts whose leases live, by caller and request_id: the same id with the same content
// attaches to the same work, and so to its lease. Another's ids are nobody's business. Thread-safe.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/caller.h"
#include "server/rpc/prefill_stream.h"

namespace prefilld {

class PrefillRegistry {
 public:
  using Start = std::function<absl::StatusOr<std::shared_ptr<PrefillStream>>()>;

  // The living stream of the caller's `request_id`, to which `reader` is attached, or the one that
  // `start` makes for it. INVALID_ARGUMENT when the living one has other content, UNAVAILABLE while
  // the lease of one ends whose last reader has left. One call of `start` at a time, so it must not
  // take long.
  absl::StatusOr<std::shared_ptr<PrefillStream>> FindOrStart(
      const Caller& caller, const std::string& request_id, const std::string& content,
      const std::shared_ptr<PrefillStream::Reader>& reader, const Start& start);
  // It never began.
  void Forget(const PrefillStream& stream);
  // The lease has ended: the id is free for another run.
  void Remove(const Caller& caller, const std::string& request_id, uint64_t generation);

 private:
  using Key = std::array<std::string, 3>;  // tenant, identity, request_id
  static Key KeyOf(const Caller& caller, const std::string& request_id) {
    return {caller.tenant, caller.identity, request_id};
  }

  absl::Mutex mutex_;
  std::map<Key, std::shared_ptr<PrefillStream>> streams_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
