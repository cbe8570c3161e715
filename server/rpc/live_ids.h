// The request_ids of the Attend calls that live. An upload cannot be shared: of two calls with the
// same id the later one is the caller's, who has given up the first, whose connection may be dead
// without anybody having said so. Thread-safe.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

class LiveIds {
 public:
  // `owner` has the id until it gives it back, or a later one of the same `peer` claims it: then
  // `give_way` runs, on that one's thread. False: another peer has it.
  bool Claim(const std::string& id, const std::string& peer, const void* owner,
             std::function<void()> give_way) {
    Entry before;
    {
      absl::MutexLock lock(&mutex_);
      Entry& entry = ids_[id];
      if (entry.owner != nullptr && entry.peer != peer) return false;
      before = std::exchange(entry, Entry{peer, owner, std::move(give_way)});
    }
    if (before.owner != nullptr) before.give_way();
    return true;
  }
  // Harmless when it has given way.
  void Release(const std::string& id, const void* owner) {
    absl::MutexLock lock(&mutex_);
    const auto found = ids_.find(id);
    if (found != ids_.end() && found->second.owner == owner) ids_.erase(found);
  }

 private:
  struct Entry {
    std::string peer;
    const void* owner = nullptr;
    std::function<void()> give_way;
  };

  absl::Mutex mutex_;
  std::map<std::string, Entry> ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
