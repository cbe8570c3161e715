// The scheduler: a bounded queue in front of one thread that owns the engine. The thread takes
// ready jobs, groups short prompts into ragged batches, and runs one step at a time: a layer of one
// batch, or of an Attend, or a part of it where it is long. Who may come in is admission.h's
// decision, which step is next policy.h's. A prompt gets the blocks of its cache when it starts.
// Cancellation and deadlines are honoured between steps. RPC threads call Admit,
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
#include "server/scheduler/admission.h"
#include "server/scheduler/fair_shares.h"
#include "server/scheduler/policy.h"
#include "server/scheduler/step_watch.h"

namespace prefilld {

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
  // RESOURCE_EXHAUSTED when full or when the deadline cannot be met, by itself or for what is there
  // already (errors.h has the facts), INVALID_ARGUMENT when no memory would do (Engine::CheckFits).
  absl::Status Admit(const std::shared_ptr<Job>& job);
  // Engine::CheckFits, which Admit and CheckOpen ask too.
  absl::Status CheckFits(const Job& job) const { return engine_.CheckFits(job); }
  // Whether Admit would take the job, but for an Attend's bytes and a cache's blocks: it can ever
  // fit, not draining, in time, the device there, a place in the queue. It reserves none: ask
  // before memory is taken for the job, and Admit afterwards.
  absl::Status CheckOpen(const Job& job) const;
  // A waiting prompt may have so many blocks before it starts, and they are counted until it is
  // admitted, for as long as this is held; null: it may not. Most are left to those that do start.
  std::shared_ptr<void> TakeAhead(const BlockPool& pool, int64_t blocks);
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
    // Since when it waits for its callers to take layers, if it does.
    std::optional<SteadyTime> kept_waiting;

    std::vector<std::shared_ptr<Job>> jobs() const {
      return batch ? batch->jobs : std::vector{attend->job};
    }
    size_t parts() const {  // of the layer that it is in, or of the Attend; 1 at least
      return std::max<size_t>(1, batch ? batch->parts.size() : attend->parts.size());
    }
    bool done() const { return batch ? batch->done() : attend->done(); }
  };

  // The thread and what only it touches.
  void Loop();
  void Receive(std::vector<Message> inbox);
  void DropLate(SteadyTime now);
  SteadyTime NextDeadline() const;
  SteadyTime MeasureAgain();
  bool RunOneStep();  // false: nothing could run
  absl::Duration Predict(size_t view) const;
  std::vector<StalledStep::Part> PartsOf(std::optional<size_t> view) const;
  void NoteParts(std::optional<size_t> view);  // before the engine may wait for them
  void NoteWaits(SteadyTime now);              // for callers
  std::vector<StepView> Views() const;
  void SetBusy(const std::vector<StepView>& views);
  double RemainingSeconds(const Active& active, const Job& job) const;
  std::optional<size_t> HolderFor(int64_t tokens) const;
  bool Computable(const Active& active) const;
  // Whether a batch of so many tokens may begin, beside those that have.
  bool HasRoom(const Transformer& model, int64_t tokens, bool retain) const;
  bool HasBlocks(const Job& job) const;
  bool PromiseIsDue(const Job& job, SteadyTime now) const;  // of one that waits
  // What a waiting prompt lacks whose promise is due: then it is left to that.
  struct Awaited {
    bool room = false, blocks = false;
  };
  Awaited AwaitedByPromises(SteadyTime now) const;
  bool MayStart(const Job& job, const Awaited& awaited) const;
  void StartBatch(size_t first);
  void Advance(size_t active);
  void Leave(size_t active);
  void StartAttend(size_t waiting);
  std::shared_ptr<Job> TakeWaiting(size_t index);
  void End(std::shared_ptr<Job> job, absl::Status result);
  void Finish(Job& job, const absl::Status& result);
  bool EndWherever(const std::shared_ptr<Job>& job, const absl::Status& status);
  void Charge(const Active& active);

  absl::Status CheckOpenLocked(const Job& job, absl::Duration work) const
      ABSL_SHARED_LOCKS_REQUIRED(mutex_);

  Engine& engine_;
  Metrics& metrics_;
  const SchedulerOptions options_;
  // Wakes the thread. Shared with who may ring it when the scheduler is gone.
  const std::shared_ptr<Bell> bell_ = std::make_shared<Bell>();
  std::vector<Waiting> waiting_;
  std::vector<Active> active_;
  FairShares shares_;
  PromiseTurns turns_;
  bool promised_ = false;  // the step that runs goes before its turn
  SteadyTime measured_ = SteadyNow();
  absl::Duration measure_again_in_ = absl::Milliseconds(500);
  // Blocks that prompts have which are not admitted yet; shared with who holds them.
  const std::shared_ptr<std::atomic<int64_t>> ahead_ = std::make_shared<std::atomic<int64_t>>(0);
  mutable std::atomic<bool> refused_as_infeasible_{false};  // since it was measured

  mutable absl::Mutex mutex_;
  SteadyCondition ended_;  // a job has
  std::vector<Message> inbox_ ABSL_GUARDED_BY(mutex_);
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  Admission admission_ ABSL_GUARDED_BY(mutex_);
  std::optional<SteadyTime> step_started_ ABSL_GUARDED_BY(mutex_);
  absl::Duration step_predicted_ ABSL_GUARDED_BY(mutex_);
  std::vector<StalledStep::Part> step_parts_ ABSL_GUARDED_BY(mutex_);
  StepWatch step_watch_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace prefilld
