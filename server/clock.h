// The server's time: on a clock that nobody sets. The wall's steps (NTP, a machine that slept), and
// what absl waits for with an end follows it: nothing but the log asks for it.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace prefilld {

// Since the machine's start, not since 1970. Infinite where there is none.
using SteadyTime = absl::Time;
inline SteadyTime SteadyNow() {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}
inline absl::Duration Since(SteadyTime begin) { return SteadyNow() - begin; }

// Waits that end at a time. Whoever may make true what others wait for signals, under the mutex.
class SteadyCondition {
 public:
  void SignalAll() const { changed_.notify_all(); }

  // Blocks until holds(), or the deadline: whether it does.
  template <typename Holds>
  bool AwaitUntil(SteadyTime deadline, absl::Mutex& mutex, Holds holds) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    Lockable lockable{mutex};
    while (!holds()) {
      const absl::Duration left = deadline - SteadyNow();
      if (left <= absl::ZeroDuration()) return false;
      const absl::Duration most = std::min(left, absl::Hours(1));  // what the clock can add
      changed_.wait_until(lockable,
                          std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(most));
    }
    return true;
  }

 private:
  struct Lockable {
    absl::Mutex& mutex;
    void lock() ABSL_NO_THREAD_SAFETY_ANALYSIS { mutex.Lock(); }
    void unlock() ABSL_NO_THREAD_SAFETY_ANALYSIS { mutex.Unlock(); }
  };

  mutable std::condition_variable_any changed_;
};

// Wakes whoever waits for it: rung once, it is heard once. Thread-safe.
class Bell {
 public:
  void Ring() {
    absl::MutexLock lock(&mutex_);
    rung_ = true;
    condition_.SignalAll();
  }
  // Until somebody rings, or has since the last time, or the deadline: false.
  bool Await(SteadyTime deadline) {
    absl::MutexLock lock(&mutex_);
    const bool rung = condition_.AwaitUntil(
        deadline, mutex_, [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return rung_; });
    rung_ = false;
    return rung;
  }

 private:
  absl::Mutex mutex_;
  SteadyCondition condition_;
  bool rung_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace prefilld
