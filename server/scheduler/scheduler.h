// The scheduler: a bounded queue in front of one thread that owns the engine. The thread takes
// ready jobs, groups short prompts into ragged batches, and runs one step at a time: a layer of one
// batch, or one Attend. Which step is next is policy.h's decision. Cancellation and deadlines are
// honoured between steps. RPC threads call Admit, UploadDone and Cancel; none of them waits for a
// step.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/engine/engine.h"
#include "server/job.h"

namespace prefilld {

struct SchedulerOptions {
  int waiting_jobs_max = 256;            // jobs; more means a longer worst wait before a refusal
  int64_t waiting_tokens_max = 4 << 20;  // tokens over all waiting jobs
  uint64_t attend_bytes_max =
      0;  // bytes of tensors of all Attend jobs in the server; set by config
  int64_t batch_tokens_max = 4096;  // tokens of short prompts that share a batch
  int active_batches_max = 4;       // batches in progress; each holds its residual stream
  absl::Duration passed_over_max =
      absl::Seconds(10);  // after this wait a step goes first, whatever its slack
};

class Scheduler {
 public:
  Scheduler(Engine& engine, Metrics& metrics, SchedulerOptions options);
  ~Scheduler();  // cancels what is left and joins

  // Takes a share of the job on OK only: then the sink hears OnFinished exactly once. An Attend job
  // is not run before UploadDone. Refuses when full, draining, late, or when the deadline cannot be
  // met.
  absl::Status Admit(const std::shared_ptr<Job>& job);
  void UploadDone(const std::shared_ptr<Job>& job);
  void Cancel(const std::shared_ptr<Job>& job,
              absl::Status why = absl::CancelledError("cancelled"));

  void Drain();                        // refuse new jobs with UNAVAILABLE from now on
  bool WaitIdle(absl::Time deadline);  // false: jobs were still there at the deadline
  // Running with no progress is not healthy: true when a step has run for longer than `limit`.
  bool Stalled(absl::Duration limit) const;

 private:
  struct Waiting {
    std::shared_ptr<Job> job;
    bool ready;
  };

  void Loop();
  void DropDead(absl::Time now, std::vector<std::pair<std::shared_ptr<Job>, absl::Status>>* dead)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RunOneStep();
  void Finish(const std::shared_ptr<Job>& job, const absl::Status& status);
  void UpdateGauges() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Engine& engine_;
  Metrics& metrics_;
  const SchedulerOptions options_;
  mutable absl::Mutex mutex_;
  std::deque<Waiting> waiting_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Batch>> active_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::pair<std::shared_ptr<Job>, absl::Status>> cancels_ ABSL_GUARDED_BY(mutex_);
  uint64_t attend_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t waiting_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  int running_jobs_ ABSL_GUARDED_BY(mutex_) = 0;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool wake_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time step_started_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  std::thread thread_;
};

}  // namespace prefilld
