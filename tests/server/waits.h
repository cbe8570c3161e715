// What tests wait with when other threads have to do something first.
#pragma once

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "server/clock.h"
#include "server/work_pool.h"

namespace prefilld {

// Asks until it is so; false when it never is.
template <typename Condition>
bool Becomes(Condition&& condition) {
  const SteadyTime deadline = SteadyNow() + absl::Seconds(30);
  while (!condition()) {
    if (SteadyNow() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

// Keeps every thread of a pool until it goes. Once it is there, all that was posted before has run.
class Held {
 public:
  Held(WorkPool& pool, int threads) : all_(threads), gone_(threads) {
    for (int i = 0; i < threads; ++i) {
      pool.Post([this] {
        all_.DecrementCount();
        go_.WaitForNotification();
        gone_.DecrementCount();
      });
    }
    all_.Wait();
  }
  ~Held() {
    go_.Notify();
    gone_.Wait();
  }

 private:
  absl::BlockingCounter all_, gone_;
  absl::Notification go_;
};

}  // namespace prefilld
