// The request_ids of the Attend calls that live, each caller's own. An upload cannot be shared: of
// two calls with the same id the later one is the caller's, who has given up the first, whose
// connection may be dead without anybody having said so. Thread-safe.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

class LiveIds {
 public:
  using Id = std::array<std::string, 3>;  // peer, identity, request_id

  // `owner` has the id until it gives it back, or a later one claims it: then `give_way` runs, on
  // that one's thread.
  void Claim(const Id& id, const void* owner, std::function<void()> give_way) {
    Entry before;
    {
      absl::MutexLock lock(&mutex_);
      before = std::exchange(ids_[id], Entry{owner, std::move(give_way)});
    }
    if (before.owner != nullptr) before.give_way();
  }
  // Harmless when it has given way.
  void Release(const Id& id, const void* owner) {
    absl::MutexLock lock(&mutex_);
    const auto found = ids_.find(id);
    if (found != ids_.end() && found->second.owner == owner) ids_.erase(found);
  }

 private:
  struct Entry {
    const void* owner = nullptr;
    std::function<void()> give_way;
  };

  absl::Mutex mutex_;
  std::map<Id, Entry> ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
