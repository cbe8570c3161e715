// One thread that looks, again and again, at what may have to end because its peer does not do its
// part: cheaper for each call than a timer of its own, which would be armed before it is known
// whether the call will be admitted. Thread-safe.
#pragma once

#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"

namespace prefilld {

class Sweeper {
 public:
  class Swept {
   public:
    virtual ~Swept() = default;
    virtual void OnSweep() = 0;  // on the thread, until it is gone; must not block
  };

  explicit Sweeper(absl::Duration every) : every_(every), thread_([this] { Loop(); }) {}
  ~Sweeper();

  void Add(std::weak_ptr<Swept> swept) {
    absl::MutexLock lock(&mutex_);
    added_.push_back(std::move(swept));
  }

 private:
  void Loop();

  const absl::Duration every_;
  absl::Mutex mutex_;
  std::vector<std::weak_ptr<Swept>> added_ ABSL_GUARDED_BY(mutex_);  // since the last sweep
  Bell stopping_;
  std::thread thread_;
};

}  // namespace prefilld
