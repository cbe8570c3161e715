// Who may come in: places that peers share, and a look at whether a deadline can be met. Counts all
// jobs from their admission to their end. Not thread-safe, the scheduler's lock guards it; never
// blocks.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <unordered_map>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/engine/layer_parts.h"
#include "server/job.h"
#include "server/record/metrics.h"
#include "server/scheduler/backlog.h"
#include "server/scheduler/shared_limit.h"

namespace prefilld {

// Of all limits on what waits, the last eighth is for peers that have less than that.
struct SchedulerOptions {
  int waiting_jobs_max = 256;            // more means a longer worst wait before a refusal
  int64_t waiting_tokens_max = 4 << 20;  // tokens over all waiting jobs
  // KV blocks that waiting jobs will need: several times what there are, as they end one after the
  // other.
  int64_t waiting_blocks_max = std::numeric_limits<int64_t>::max();
  // Attends whose tensors are on their way: they wait for their peers and hold no place in the
  // queue. As many may find it full when they have arrived, and wait all the same.
  int uploads_max = 1024;
  uint64_t attend_bytes_max = uint64_t{4} << 30;  // tensors of all Attend jobs in the server
  // Tokens of short prompts that share a batch; at most as many pass a long one.
  int64_t batch_tokens_max = kShortBatchTokens;
  // Of the residual streams of batches in progress. Long ones leave room for a batch of short ones,
  // and those that are not retained, and may have to wait for their callers, have half of it.
  uint64_t batch_bytes_max = std::numeric_limits<uint64_t>::max();
  bool measures_again = true;  // Engine::Recalibrate, when there is nothing else to do
};

class Admission {
 public:
  Admission(const SchedulerOptions& options, Metrics& metrics);

  // Whether there is a place for the job, and its deadline can be met; work: predicted, all of it.
  // Not asked: for an Attend's bytes and a cache's blocks.
  absl::Status Check(const Job& job, absl::Duration work) const;
  // A place, from which the job goes on by the calls below, or why not. Sets what the caller is
  // told, and the promise.
  absl::Status Take(Job& job, absl::Duration work);
  void Uploaded(Job& job, absl::Duration work);  // all tensors of an Attend are here
  void Started(Job& job);                        // it waits no more
  // A step is begun that takes so long by prediction.
  void SetStep(SteadyTime begin, absl::Duration predicted) { step_end_ = begin + predicted; }
  void Progressed(const Job& job, absl::Duration remaining);
  void Ended(const Job& job);

  int jobs() const { return static_cast<int>(live_.size()); }
  // Blocks that jobs hold which have not started.
  int64_t BlocksAhead() const;

 private:
  struct Live {
    Work work;
    bool unretained = false;
    int64_t waiting_blocks = 0;  // that it waits for, of its queue's limit
  };
  // Attends' memory goes on other threads, and after the scheduler.
  struct AttendBytes {
    explicit AttendBytes(uint64_t most) : limit(static_cast<int64_t>(most)) {}
    absl::Mutex mutex;
    SharedLimit limit ABSL_GUARDED_BY(mutex);
  };

  Backlog BacklogNow(SteadyTime now) const;
  Outlook OutlookOf(const Job& job, absl::Duration work, SteadyTime now) const;
  absl::Status CheckPlaces(const Job& job) const;
  absl::Status CheckBlocks(const Job& job) const;
  absl::Status TakeBytes(Job& job);
  void Queue(Job& job, Live& live);
  void Publish();
  absl::Duration Hint() const;  // when who found no place may come again

  Metrics& metrics_;
  SharedLimit waiting_, tokens_, blocks_, uploads_, unretained_;
  const std::shared_ptr<AttendBytes> attend_bytes_;
  SteadyTime step_end_ = absl::InfinitePast();  // by prediction
  std::unordered_map<const Job*, Live> live_;
};

}  // namespace prefilld
