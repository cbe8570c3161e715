// What follows the work of a device, off the thread that enqueues it: a thread of its own waits for
// a mark, then runs what was posted with it, in the order of posting. Owned by the engine.
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"

namespace prefilld {

class CompletionQueue {
 public:
  // Told how the work before its mark went. It must not wait, neither for a caller nor for a step:
  // what it needs, it owns.
  using Completion = std::function<void(const absl::Status& work)>;

  explicit CompletionQueue(size_t tickets_max = 256);
  ~CompletionQueue();  // when all that was posted has run

  // A ticket: `then` runs once `mark` is reached, null being reached already, and all that was
  // posted before has run. Blocks while tickets_max are on their way; not from a completion.
  void Post(std::unique_ptr<Device::Mark> mark, Completion then);
  // Blocks until all that was posted before has run and is gone. Not from a completion.
  void Flush();

 private:
  struct Ticket {
    std::unique_ptr<Device::Mark> mark;
    Completion then;
  };
  void Loop();

  const size_t tickets_max_;
  absl::Mutex mutex_;
  std::deque<Ticket> tickets_ ABSL_GUARDED_BY(mutex_);  // to be run
  uint64_t posted_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace prefilld
