#include "server/scheduler/admission.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/kv/kv_cache.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

// An upload takes part in the outlook of others for so long after something of it came: who does
// not send is not waited for.
constexpr absl::Duration kUploadCounts = absl::Seconds(1);

bool Unretained(const Job& job) {
  return job.prefill && job.prefill->cache && !job.prefill->cache->retain();
}

std::string SecondsOf(absl::Duration duration) {
  return absl::FormatDuration(absl::Milliseconds(absl::ToInt64Milliseconds(duration)));
}

absl::Status Full(const char* reason, const std::string& message, absl::Duration again) {
  return RetryLater(absl::StatusCode::kResourceExhausted, reason, message, again);
}

absl::Status CheckDeadline(const Outlook& outlook, absl::Duration work, absl::Duration left) {
  switch (outlook.answer) {
    case Outlook::Answer::kInfeasible:
      return DeadlineInfeasible(absl::StrCat("the work takes about ", SecondsOf(work),
                                             ", the deadline is in ", SecondsOf(left)));
    case Outlook::Answer::kLater:
      return Full("backlog",
                  absl::StrCat("the work takes about ", SecondsOf(work), " and waits for ",
                               SecondsOf(outlook.wait), ", the deadline is in ", SecondsOf(left),
                               "; what is admitted already would be late with it, or it itself"),
                  std::clamp(outlook.retry_after, absl::Milliseconds(100), absl::Seconds(60)));
    case Outlook::Answer::kInTime:
      break;
  }
  return absl::OkStatus();
}

}  // namespace

Admission::Admission(const SchedulerOptions& options, Metrics& metrics)
    : metrics_(metrics),
      waiting_(options.waiting_jobs_max),
      tokens_(options.waiting_tokens_max),
      blocks_(options.waiting_blocks_max),
      uploads_(options.uploads_max),
      unretained_(options.waiting_jobs_max),
      attend_bytes_(std::make_shared<AttendBytes>(options.attend_bytes_max)) {}

absl::Status Admission::Check(const Job& job, absl::Duration work) const {
  const SteadyTime now = SteadyNow();
  // gRPC rounds a deadline up: less than a millisecond left is none.
  if (job.deadline.at() <= now + absl::Milliseconds(1)) {
    return absl::DeadlineExceededError("the deadline has passed already");
  }
  absl::Status status = CheckDeadline(OutlookOf(job, work, now), work, job.deadline.at() - now);
  return status.ok() ? CheckPlaces(job) : status;
}

absl::Status Admission::CheckPlaces(const Job& job) const {
  if (!waiting_.HasRoom(job.peer, 1)) {
    return Full("queue_full",
                absl::StrCat(waiting_.used(), " jobs wait, the limit is ", waiting_.most()),
                Hint());
  }
  if (!tokens_.HasRoom(job.peer, job.tokens())) {
    return Full("queue_full",
                absl::StrCat(tokens_.used(), " tokens wait, this job has ", job.tokens(),
                             ", the limit is ", tokens_.most()),
                Hint());
  }
  if (job.attend && !uploads_.HasRoom(job.peer, 1)) {
    return Full("uploads",
                absl::StrCat(uploads_.used(), " Attends are being uploaded, the limit is ",
                             uploads_.most()),
                absl::Seconds(1));
  }
  if (Unretained(job) && !unretained_.HasRoom(job.peer, 1)) {
    return Full(
        "unretained",
        absl::StrCat(unretained_.used(), " Prefills with retain = false are there, the limit is ",
                     unretained_.most()),
        Hint());
  }
  return absl::OkStatus();
}

// What finished prompts have left is there for the next, what their callers still lease is not.
absl::Status Admission::CheckBlocks(const Job& job) const {
  if (!job.prefill || !job.prefill->cache) return absl::OkStatus();
  const KvCache& cache = *job.prefill->cache;
  const int64_t needed = cache.blocks_awaited();
  if (needed == 0) return absl::OkStatus();
  const int64_t total = cache.pool().total();
  if (needed > total) {
    return InvalidField(
        "token_ids", absl::StrCat("the KV cache needs ", needed, " blocks, the server has ", total,
                                  "; pull with retain = false or shorten the prompt"));
  }
  if (!blocks_.HasRoom(job.peer, needed)) {
    return Full("kv_memory",
                absl::StrCat("the KV cache needs ", needed, " blocks, waiting prompts need ",
                             blocks_.used(), ", the limit is ", blocks_.most()),
                Hint());
  }
  int64_t there = cache.pool().free();
  for (auto it = live_.begin(); there < needed && it != live_.end(); ++it) {
    const auto& prefill = it->first->prefill;
    if (prefill && prefill->cache) there += prefill->cache->blocks_held();
  }
  if (there >= needed) return absl::OkStatus();
  return Full("kv_memory",
              absl::StrCat("the KV cache needs ", needed, " blocks, all but ", there, " of ", total,
                           " are leased"),
              absl::Seconds(1));
}

Backlog Admission::BacklogNow(SteadyTime now) const {
  Backlog backlog(std::max(absl::ZeroDuration(), step_end_ - now));
  for (const auto& [job, live] : live_) {
    Work work = live.work;
    if (job->place == Job::Place::kUploading && now - job->moved.at() > kUploadCounts) {
      continue;
    }
    work.deadline = job->deadline.at();
    backlog.Add(job->peer, work);
  }
  return backlog;
}

Outlook Admission::OutlookOf(const Job& job, absl::Duration work, SteadyTime now) const {
  return BacklogNow(now).OutlookOf(job.peer,
                                   {.arrival = now,
                                    .deadline = job.deadline.at(),
                                    .remaining = work,
                                    .priority = job.priority,
                                    .share = job.share},
                                   now);
}

absl::Status Admission::TakeBytes(Job& job) {
  const auto bytes = static_cast<int64_t>(job.held_bytes);
  if (bytes == 0) return absl::OkStatus();
  absl::MutexLock lock(&attend_bytes_->mutex);
  SharedLimit& limit = attend_bytes_->limit;
  if (bytes > limit.most() || !limit.HasRoom(job.peer, bytes)) {
    return Full("attend_memory",
                absl::StrCat("this Attend holds ", bytes, " bytes, ", limit.used(), " of ",
                             limit.most(), " are taken"),
                Hint());
  }
  limit.Take(job.peer, bytes);
  job.budget = std::shared_ptr<void>(nullptr, [of = attend_bytes_, peer = job.peer, bytes](void*) {
    absl::MutexLock give(&of->mutex);
    of->limit.GiveBack(peer, bytes);
  });
  return absl::OkStatus();
}

absl::Status Admission::Take(Job& job, absl::Duration work) {
  absl::Status status = Check(job, work);
  if (status.ok()) status = CheckBlocks(job);
  if (status.ok()) status = TakeBytes(job);
  if (!status.ok()) return status;
  const SteadyTime now = SteadyNow();
  const Outlook outlook = OutlookOf(job, work, now);
  job.queue_position = jobs();
  job.estimated_wait = outlook.wait;
  job.promise = outlook.promise;
  Live& live = live_[&job];
  live.work = {.arrival = now, .remaining = work, .priority = job.priority, .share = job.share};
  live.unretained = Unretained(job);
  if (live.unretained) unretained_.Take(job.peer, 1);
  if (job.attend) {
    job.place = Job::Place::kUploading;
    uploads_.Take(job.peer, 1);
  } else {
    Queue(job, live);
  }
  Publish();
  return absl::OkStatus();
}

void Admission::Queue(Job& job, Live& live) {
  job.place = Job::Place::kWaiting;
  live.work.promise = job.promise;
  live.waiting_blocks =
      job.prefill && job.prefill->cache ? job.prefill->cache->blocks_awaited() : 0;
  waiting_.Take(job.peer, 1);
  tokens_.Take(job.peer, job.tokens());
  if (live.waiting_blocks > 0) blocks_.Take(job.peer, live.waiting_blocks);
}

void Admission::Uploaded(Job& job, absl::Duration work) {
  job.uploaded = SteadyNow();
  if (job.place != Job::Place::kUploading) return;  // it has ended
  uploads_.GiveBack(job.peer, 1);
  Live& live = live_.at(&job);
  live.work.remaining = work;
  // The time of its caller is not the order's.
  const SteadyTime later = job.promise + (job.uploaded - live.work.arrival);
  job.promise = BacklogNow(job.uploaded).PromiseFrom(later, work, job.uploaded);
  Queue(job, live);
  Publish();
}

void Admission::Started(Job& job) {
  Live& live = live_.at(&job);
  if (job.place == Job::Place::kUploading) {
    uploads_.GiveBack(job.peer, 1);
  } else if (job.place == Job::Place::kWaiting) {
    waiting_.GiveBack(job.peer, 1);
    tokens_.GiveBack(job.peer, job.tokens());
    if (live.waiting_blocks > 0) blocks_.GiveBack(job.peer, live.waiting_blocks);
  }
  job.place = Job::Place::kNone;
  Publish();
}

void Admission::Progressed(const Job& job, absl::Duration remaining) {
  const auto found = live_.find(&job);
  if (found == live_.end()) return;
  found->second.work.remaining = remaining;
  found->second.work.promise = job.promise;
}

void Admission::Ended(const Job& job) {
  if (live_.at(&job).unretained) unretained_.GiveBack(job.peer, 1);
  live_.erase(&job);
}

int64_t Admission::BlocksAhead() const {
  int64_t blocks = 0;
  for (const auto& [job, live] : live_) {
    const bool waits = job->place == Job::Place::kWaiting && job->prefill && job->prefill->cache;
    if (waits) blocks += job->prefill->cache->blocks_held();
  }
  return blocks;
}

void Admission::Publish() {
  metrics_.uploads.Set(static_cast<double>(uploads_.used()));
  metrics_.waiting.Set(static_cast<double>(waiting_.used()));
  metrics_.queue_tokens.Set(static_cast<double>(tokens_.used()));
}

// Places come back as jobs start, one after the other.
absl::Duration Admission::Hint() const {
  absl::Duration all;
  for (const auto& [job, live] : live_) all += live.work.remaining;
  return std::clamp(all / 4, absl::Milliseconds(100), absl::Seconds(60));
}

}  // namespace prefilld
