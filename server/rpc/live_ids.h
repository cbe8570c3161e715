// The request_ids of the Attend calls that live, each caller's own: an upload cannot be shared, so
// a second call with the same id is refused instead of run twice. Thread-safe.
#pragma once

#include <array>
#include <set>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

class LiveIds {
 public:
  using Id = std::array<std::string, 3>;  // tenant, identity, request_id

  bool Claim(const Id& id) {  // false: it lives
    absl::MutexLock lock(&mutex_);
    return ids_.insert(id).second;
  }
  void Release(const Id& id) {
    absl::MutexLock lock(&mutex_);
    ids_.erase(id);
  }

 private:
  absl::Mutex mutex_;
  std::set<Id> ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
