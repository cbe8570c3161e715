// A few threads for work that would keep others waiting, queued in order: gRPC has few threads, and
// the engine one. Its queue has no bound of its own: whoever posts has taken a share of what
// admission bounds first. Thread-safe.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

class WorkPool {
 public:
  using Work = std::function<void()>;

  explicit WorkPool(int threads);
  WorkPool(const WorkPool&) = delete;
  WorkPool& operator=(const WorkPool&) = delete;
  ~WorkPool() { Stop(); }

  // Neither waits. Work is run, and destroyed, on one of the threads; after Stop on the caller's.
  void Post(Work work) { Add(std::move(work), false); }
  // Before all that waits: for what gives back what others wait for.
  void PostFirst(Work work) { Add(std::move(work), true); }

  // Runs what was posted and joins the threads.
  void Stop();

 private:
  void Add(Work work, bool first);
  void Loop();

  absl::Mutex mutex_;
  std::deque<Work> queue_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace prefilld
