// The request_ids of the Attend calls that live: an upload cannot be shared, so a second call with
// the same id is refused instead of run twice. Thread-safe.
#pragma once

#include <set>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

class LiveIds {
 public:
  bool Claim(const std::string& id) {  // false: it lives
    absl::MutexLock lock(&mutex_);
    return ids_.insert(id).second;
  }
  void Release(const std::string& id) {
    absl::MutexLock lock(&mutex_);
    ids_.erase(id);
  }

 private:
  absl::Mutex mutex_;
  std::set<std::string> ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
