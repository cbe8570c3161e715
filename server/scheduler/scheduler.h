// The scheduler: a bounded queue in front of one thread that owns the engine. The thread takes
// ready jobs, groups short prompts into ragged batches, and runs one step at a time: a layer of one
// batch, or a part of it where it is long, or one Attend. Which step is next is policy.h's
// decision. Cancellation and deadlines are honoured between steps. RPC threads call Admit,
// UploadDone and Cancel; none of them waits for a step. Jobs end, and their sinks hear of it, on
// the engine's completion thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/engine/engine.h"
#include "server/job.h"
#include "server/record/metrics.h"
#include "server/scheduler/policy.h"
#include "server/scheduler/step_watch.h"

namespace prefilld {

struct SchedulerOptions {
  int waiting_jobs_max = 256;            // more means a longer worst wait before a refusal
  int64_t waiting_tokens_max = 4 << 20;  // tokens over all waiting jobs
  // Attends whose tensors are on their way: they wait for their peers and hold no place in the
  // queue. As many may find it full when they have arrived, and wait all the same.
  int uploads_max = 1024;
  uint64_t attend_bytes_max = uint64_t{4} << 30;  // tensors of all Attend jobs in the server
  // Tokens of short prompts that share a batch; at most as many pass a long one.
  int64_t batch_tokens_max = kShortBatchTokens;
  int active_batches_max = 4;  // batches in progress, of short prompts and of long ones; each holds
                               // its residual stream
  // A step that waited for this long goes first, whatever the others' slack or priority.
  // What is in parts waits for as long again within its layer.
  absl::Duration passed_over_max = absl::Seconds(5);
};

// What the engine waits for: what was enqueued first is first.
struct StalledStep {
  struct Part {
    std::vector<std::string> request_ids;
    std::string model;         // kAttendModel: an Attend
    std::optional<int> layer;  // none: an Attend
  };
  std::vector<Part> parts;
  absl::Duration waited, predicted;
};

class Scheduler {
 public:
  Scheduler(Engine& engine, Metrics& metrics, SchedulerOptions options);
  ~Scheduler();  // cancels what is left and joins

  // Takes a share of the job on OK only: then the sink hears OnFinished exactly once. An Attend job
  // is not run before UploadDone. UNAVAILABLE when draining, DEADLINE_EXCEEDED when late,
  // RESOURCE_EXHAUSTED when full or when the deadline cannot be met (errors.h has the facts),
  // INVALID_ARGUMENT when no memory would do (Engine::CheckFits).
  absl::Status Admit(const std::shared_ptr<Job>& job);
  // Engine::CheckFits, which Admit and CheckOpen ask too.
  absl::Status CheckFits(const Job& job) const { return engine_.CheckFits(job); }
  // Whether Admit would take the job, but for an Attend's bytes: it can ever fit, not draining, not
  // late, not hopeless, the device there, a place in the queue. It reserves none: ask before memory
  // is taken for the job, and Admit afterwards.
  absl::Status CheckOpen(const Job& job) const;
  void UploadDone(const std::shared_ptr<Job>& job);
  // Ends the job with `why` before its next step. Harmless when it has ended.
  void Cancel(const std::shared_ptr<Job>& job,
              absl::Status why = absl::CancelledError("cancelled"));

  void Drain();                        // refuse new jobs with UNAVAILABLE from now on
  bool WaitIdle(SteadyTime deadline);  // false: jobs were still there at the deadline
  // A step that has been seen to run for longer than `least` and twenty times its prediction: it
  // does not end any more. For one who asks once a `period`.
  std::optional<StalledStep> Stalled(absl::Duration least, absl::Duration period);

 private:
  enum class What { kAdmit, kUploaded, kCancel };
  struct Message {
    What what;
    std::shared_ptr<Job> job;
    absl::Status why;
  };
  struct Waiting {
    std::shared_ptr<Job> job;
    bool ready;  // every tensor has arrived
  };
  struct Active {  // one of the two
    std::unique_ptr<Batch> batch;
    std::unique_ptr<AttendRun> attend;
    SteadyTime last_run;

    std::vector<std::shared_ptr<Job>> jobs() const {
      return batch ? batch->jobs : std::vector{attend->job};
    }
    size_t parts() const {  // of the layer that it is in, or of the Attend; 1 at least
      return std::max<size_t>(1, batch ? batch->parts.size() : attend->parts.size());
    }
    bool begun() const { return batch ? batch->scratch != nullptr : true; }  // that layer
    bool done() const { return batch ? batch->done() : attend->done(); }
  };

  // The thread and what only it touches.
  void Loop();
  void Receive(std::vector<Message> inbox);
  void DropLate(SteadyTime now);
  SteadyTime NextDeadline() const;
  bool RunOneStep();  // false: nothing could run
  absl::Duration Predict(size_t view) const;
  std::vector<StalledStep::Part> PartsOf(std::optional<size_t> view) const;
  void NoteParts(std::optional<size_t> view);  // before the engine may wait for them
  std::vector<StepView> Views() const;
  double RemainingSeconds(const Active& active, const Job& job) const;
  std::optional<size_t> HolderFor(int64_t tokens) const;
  bool HasRoom(const Job& job) const;  // to begin a batch with this Prefill
  bool RoomIsAwaited() const;
  void StartBatch(size_t first);
  void Advance(size_t active);
  void Leave(size_t active);
  void StartAttend(size_t waiting);
  std::shared_ptr<Job> TakeWaiting(size_t index);
  void End(std::shared_ptr<Job> job, absl::Status result);
  void Finish(Job& job, const absl::Status& result);
  bool EndWherever(const std::shared_ptr<Job>& job, const absl::Status& status);
  void PublishLoad();

  absl::Status CheckOpenLocked(const Job& job, double seconds) const
      ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void Queue(Job& job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Duration WaitHint() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);  // for who is refused

  Engine& engine_;
  Metrics& metrics_;
  const SchedulerOptions options_;
  // Wakes the thread. Shared with who may ring it when the scheduler is gone.
  const std::shared_ptr<Bell> bell_ = std::make_shared<Bell>();
  std::vector<Waiting> waiting_;
  std::vector<Active> active_;

  // Of all Attend jobs that live, in the scheduler or not; shared with their budgets.
  const std::shared_ptr<std::atomic<uint64_t>> attend_bytes_ =
      std::make_shared<std::atomic<uint64_t>>(0);

  mutable absl::Mutex mutex_;
  SteadyCondition ended_;  // jobs_ went down
  std::vector<Message> inbox_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  int jobs_ ABSL_GUARDED_BY(mutex_) = 0;          // admitted and not ended
  int waiting_jobs_ ABSL_GUARDED_BY(mutex_) = 0;  // admitted, all here, not started
  int uploads_ ABSL_GUARDED_BY(mutex_) = 0;       // admitted, not all here
  int unretained_ ABSL_GUARDED_BY(mutex_) = 0;    // Prefills whose callers must keep pace
  int64_t waiting_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  double backlog_seconds_ ABSL_GUARDED_BY(mutex_) = 0;  // predicted work of all jobs
  std::optional<SteadyTime> step_started_ ABSL_GUARDED_BY(mutex_);
  absl::Duration step_predicted_ ABSL_GUARDED_BY(mutex_);
  std::vector<StalledStep::Part> step_parts_ ABSL_GUARDED_BY(mutex_);
  StepWatch step_watch_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace prefilld
