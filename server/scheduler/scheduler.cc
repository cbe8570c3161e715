#include "server/scheduler/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/kv/kv_cache.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

// A deadline is called infeasible only when the job's own predicted work exceeds what is left by
// this factor: the cost model may be off, a wrong refusal is worse than a late answer.
constexpr double kInfeasibleFactor = 1.5;

// A step that takes so many times its prediction does not end.
constexpr double kStalledFactor = 20;

void StartClock(Job& job) {
  const SteadyTime now = SteadyNow();
  const SteadyTime ready = job.attend ? std::min(job.uploaded, now) : job.arrival;
  job.phases[static_cast<size_t>(Phase::kQueue)] = absl::ToDoubleSeconds(now - ready);
  job.phases[static_cast<size_t>(Phase::kUpload)] = absl::ToDoubleSeconds(ready - job.arrival);
}

bool Unretained(const Job& job) {
  return job.prefill && job.prefill->cache && !job.prefill->cache->retain();
}

bool MayShareBatch(const Job& a, const Job& b) {
  return b.prefill && a.prefill->model == b.prefill->model && a.policy == b.policy &&
         a.method_unspecified == b.method_unspecified && a.prefill->cache->retain() &&
         b.prefill->cache->retain();  // a batch never waits for one job's consumer
}

}  // namespace

Scheduler::Scheduler(Engine& engine, Metrics& metrics, SchedulerOptions options)
    : engine_(engine), metrics_(metrics), options_(options), thread_([this] { Loop(); }) {}

Scheduler::~Scheduler() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
  }
  bell_->Ring();
  thread_.join();
  engine_.completions().Flush();  // they tell us
}

absl::Status Scheduler::CheckOpen(const Job& job) const {
  if (absl::Status status = engine_.CheckFits(job); !status.ok()) return status;
  const double seconds = engine_.PredictSeconds(job);
  absl::MutexLock lock(&mutex_);
  return CheckOpenLocked(job, seconds);
}

absl::Status Scheduler::CheckOpenLocked(const Job& job, double seconds) const {
  const SteadyTime now = SteadyNow();
  if (draining_ || stop_) return Draining();
  if (absl::Status lost = engine_.CheckDevice(); !lost.ok()) return lost;
  // gRPC rounds a deadline up: less than a millisecond left is none.
  if (job.deadline.at() <= now + absl::Milliseconds(1)) {
    return absl::DeadlineExceededError("the deadline has passed already");
  }
  if (now + absl::Seconds(seconds / kInfeasibleFactor) > job.deadline.at()) {
    return DeadlineInfeasible(
        absl::StrCat("the work takes about ", absl::FormatDuration(absl::Seconds(seconds)),
                     ", the deadline is in ", absl::FormatDuration(job.deadline.at() - now)));
  }
  if (waiting_jobs_ >= options_.waiting_jobs_max) {
    return RetryLater(
        absl::StatusCode::kResourceExhausted, "queue_full",
        absl::StrCat(waiting_jobs_, " jobs wait, the limit is ", options_.waiting_jobs_max),
        WaitHint());
  }
  if (waiting_jobs_ > 0 && waiting_tokens_ + job.tokens() > options_.waiting_tokens_max) {
    return RetryLater(absl::StatusCode::kResourceExhausted, "queue_full",
                      absl::StrCat(waiting_tokens_, " tokens wait, this job has ", job.tokens(),
                                   ", the limit is ", options_.waiting_tokens_max),
                      WaitHint());
  }
  if (job.attend && uploads_ >= options_.uploads_max) {
    return RetryLater(
        absl::StatusCode::kResourceExhausted, "uploads",
        absl::StrCat(uploads_, " Attends are being uploaded, the limit is ", options_.uploads_max),
        absl::Seconds(1));
  }
  if (Unretained(job) && unretained_ >= options_.waiting_jobs_max) {
    return RetryLater(absl::StatusCode::kResourceExhausted, "unretained",
                      absl::StrCat(unretained_,
                                   " Prefills with retain = false are there, the "
                                   "limit is ",
                                   options_.waiting_jobs_max),
                      WaitHint());
  }
  return absl::OkStatus();
}

absl::Duration Scheduler::WaitHint() const {
  return std::clamp(absl::Seconds(backlog_seconds_), absl::Milliseconds(100), absl::Seconds(60));
}

absl::Status Scheduler::Admit(const std::shared_ptr<Job>& job) {
  if (absl::Status status = engine_.CheckFits(*job); !status.ok()) return status;
  const double seconds = engine_.PredictSeconds(*job);
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = CheckOpenLocked(*job, seconds); !status.ok()) return status;
  const uint64_t bytes = job->held_bytes;
  if (*attend_bytes_ + bytes > options_.attend_bytes_max) {
    return RetryLater(absl::StatusCode::kResourceExhausted, "attend_memory",
                      absl::StrCat("this Attend holds ", bytes, " bytes, ", attend_bytes_->load(),
                                   " of ", options_.attend_bytes_max, " are taken"),
                      WaitHint());
  }
  if (bytes > 0) {
    *attend_bytes_ += bytes;
    job->budget =
        std::shared_ptr<void>(nullptr, [held = attend_bytes_, bytes](void*) { *held -= bytes; });
  }
  job->queue_position = jobs_;
  job->estimated_wait = absl::Seconds(backlog_seconds_);
  ++jobs_;
  unretained_ += Unretained(*job) ? 1 : 0;
  if (job->attend) {
    job->place = Job::Place::kUploading;
    metrics_.uploads.Set(++uploads_);
  } else {
    Queue(*job);
    backlog_seconds_ += seconds;
  }
  if (job->prefill) job->prefill->cache->SetOnSlotFree([bell = bell_] { bell->Ring(); });
  inbox_.push_back({What::kAdmit, job, absl::OkStatus()});
  bell_->Ring();
  return absl::OkStatus();
}

void Scheduler::Queue(Job& job) {
  job.place = Job::Place::kWaiting;
  ++waiting_jobs_;
  waiting_tokens_ += job.tokens();
  metrics_.waiting.Set(waiting_jobs_);
  metrics_.queue_tokens.Set(static_cast<double>(waiting_tokens_));
}

void Scheduler::UploadDone(const std::shared_ptr<Job>& job) {
  const double seconds = engine_.PredictSeconds(*job);
  absl::MutexLock lock(&mutex_);
  job->uploaded = SteadyNow();
  if (job->place == Job::Place::kUploading) {  // else it has ended
    metrics_.uploads.Set(--uploads_);
    Queue(*job);
    backlog_seconds_ += seconds;
  }
  inbox_.push_back({What::kUploaded, job, absl::OkStatus()});
  bell_->Ring();
}

void Scheduler::Cancel(const std::shared_ptr<Job>& job, absl::Status why) {
  job->cancelled = true;
  absl::MutexLock lock(&mutex_);
  if (stop_) return;
  inbox_.push_back({What::kCancel, job, std::move(why)});
  bell_->Ring();
}

void Scheduler::Drain() {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
}

bool Scheduler::WaitIdle(SteadyTime deadline) {
  absl::MutexLock lock(&mutex_);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return jobs_ == 0; };
  return ended_.AwaitUntil(deadline, mutex_, idle);
}

std::optional<StalledStep> Scheduler::Stalled(absl::Duration least, absl::Duration period) {
  absl::MutexLock lock(&mutex_);
  const absl::Duration seen = step_watch_.Look(step_started_, SteadyNow(), period);
  if (seen <= std::max(least, kStalledFactor * step_predicted_)) return std::nullopt;
  return StalledStep{.parts = step_parts_, .waited = seen, .predicted = step_predicted_};
}

void Scheduler::Loop() {
  for (;;) {
    std::vector<Message> inbox;
    NoteParts(std::nullopt);
    {
      absl::MutexLock lock(&mutex_);
      if (stop_) break;
      inbox.swap(inbox_);
      step_started_ = SteadyNow();  // a job that ends waits for the layer that is on its way
    }
    Receive(std::move(inbox));
    DropLate(SteadyNow());
    const bool ran = RunOneStep();
    PublishLoad();
    if (!ran) bell_->Await(NextDeadline());
  }
  std::vector<Message> inbox;
  {
    absl::MutexLock lock(&mutex_);
    inbox.swap(inbox_);
  }
  Receive(std::move(inbox));
  const absl::Status why = absl::UnavailableError("the server has stopped");
  while (!waiting_.empty()) EndWherever(std::shared_ptr<Job>(waiting_.back().job), why);
  while (!active_.empty()) EndWherever(active_.back().jobs().back(), why);
}

void Scheduler::Receive(std::vector<Message> inbox) {
  for (Message& message : inbox) {
    switch (message.what) {
      case What::kAdmit:
        waiting_.push_back({message.job, message.job->prefill != nullptr});
        break;
      case What::kUploaded:
        for (Waiting& waiting : waiting_) {
          if (waiting.job == message.job) waiting.ready = true;
        }
        break;
      case What::kCancel:
        EndWherever(message.job, message.why);
        break;
    }
  }
}

void Scheduler::DropLate(SteadyTime now) {
  std::vector<std::shared_ptr<Job>> late;
  for (const Waiting& waiting : waiting_) {
    if (waiting.job->deadline.at() <= now) late.push_back(waiting.job);
  }
  for (const Active& active : active_) {
    for (const auto& job : active.jobs()) {
      if (job->deadline.at() <= now) late.push_back(job);
    }
  }
  for (const auto& job : late) {
    EndWherever(job, absl::DeadlineExceededError("the deadline passed before the work was done"));
  }
}

// Only an idle loop waits for it: while steps run, deadlines are looked at between them.
SteadyTime Scheduler::NextDeadline() const {
  SteadyTime next = absl::InfiniteFuture();
  for (const Waiting& waiting : waiting_) next = std::min(next, waiting.job->deadline.at());
  for (const Active& active : active_) {
    for (const auto& job : active.jobs()) next = std::min(next, job->deadline.at());
  }
  return next;
}

bool Scheduler::RunOneStep() {
  const auto next = PickNext(Views(), SteadyNow(), options_.passed_over_max);
  NoteParts(next);
  {
    absl::MutexLock lock(&mutex_);
    step_started_ = SteadyNow();
    if (next) step_predicted_ = Predict(*next);  // else of what is on its way
  }
  bool ran = true;
  if (!next) {
    ran = engine_.Settle();
  } else if (*next < active_.size()) {
    Advance(*next);
  } else if (waiting_[*next - active_.size()].job->attend) {
    StartAttend(*next - active_.size());
  } else {
    StartBatch(*next - active_.size());
  }
  absl::MutexLock lock(&mutex_);
  step_started_.reset();
  return ran;
}

// How long the step of a view may take by the cost model, and what it may wait for: an Attend, or a
// layer and the one before it; of what is in parts, its share.
absl::Duration Scheduler::Predict(size_t view) const {
  const bool waits = view >= active_.size();
  const auto jobs = waits ? std::vector{waiting_[view - active_.size()].job} : active_[view].jobs();
  double seconds = 0;
  for (const auto& job : jobs) {
    seconds += job->attend ? engine_.PredictSeconds(*job) : 2 * engine_.PredictLayerSeconds(*job);
  }
  return absl::Seconds(waits ? seconds : seconds / static_cast<double>(active_[view].parts()));
}

// The layers that are on their way, and the step of the view behind them: of a batch that is still
// to begin, by the job that it begins with.
std::vector<StalledStep::Part> Scheduler::PartsOf(std::optional<size_t> view) const {
  std::vector<StalledStep::Part> parts;
  const auto add = [&](const Batch& batch, int layer) {
    const bool same = !parts.empty() && parts.back().layer == layer &&
                      parts.back().request_ids.front() == batch.jobs.front()->request_id;
    if (same) return;  // another part of it
    StalledStep::Part& part = parts.emplace_back();
    for (const auto& job : batch.jobs) part.request_ids.push_back(job->request_id);
    part.model = batch.model->info().name;
    part.layer = layer;
  };
  for (const auto& [batch, layer] : engine_.OnTheirWay()) add(*batch, layer);
  if (!view) return parts;
  const bool waits = *view >= active_.size();
  if (!waits && active_[*view].batch) {
    add(*active_[*view].batch, active_[*view].batch->next_layer);
    return parts;
  }
  const Job& job = waits ? *waiting_[*view - active_.size()].job : *active_[*view].attend->job;
  StalledStep::Part& part = parts.emplace_back();
  part.request_ids.push_back(job.request_id);
  part.model = kAttendModel;
  if (job.attend) return parts;
  part.model = job.prefill->model->info().name;
  part.layer = 0;
  return parts;
}

void Scheduler::NoteParts(std::optional<size_t> view) {
  auto parts = PartsOf(view);
  absl::MutexLock lock(&mutex_);
  step_parts_.swap(parts);
}

// The chosen job, and the short ones that may come along while the token budget lasts.
void Scheduler::StartBatch(size_t first) {
  std::vector<std::shared_ptr<Job>> jobs = {TakeWaiting(first)};
  int64_t tokens = jobs[0]->tokens();
  for (size_t i = 0; i < waiting_.size();) {
    const Job& other = *waiting_[i].job;
    if (waiting_[i].ready && MayShareBatch(*jobs[0], other) &&
        tokens + other.tokens() <= options_.batch_tokens_max &&
        engine_.CanStep(tokens + other.tokens()) &&
        engine_.HasRoom(*other.prefill->model, tokens + other.tokens())) {
      tokens += other.tokens();
      jobs.push_back(TakeWaiting(i));
    } else {
      ++i;
    }
  }
  auto batch = engine_.Begin(jobs);
  if (!batch.ok()) {
    for (const auto& job : jobs) End(job, batch.status());
    return;
  }
  (*batch)->on_failed = [this](const std::shared_ptr<Job>& job, const absl::Status& why) {
    Cancel(job, why);
  };
  active_.push_back({.batch = *std::move(batch), .last_run = SteadyNow()});
  NoteParts(active_.size() - 1);  // with all of its jobs
  Advance(active_.size() - 1);
}

void Scheduler::StartAttend(size_t index) {
  active_.push_back({.attend = engine_.BeginAttend(TakeWaiting(index)), .last_run = SteadyNow()});
  Advance(active_.size() - 1);
}

void Scheduler::Advance(size_t index) {
  Active& active = active_[index];
  absl::Status status =
      active.batch ? engine_.RunStep(*active.batch) : engine_.RunStep(*active.attend);
  active.last_run = SteadyNow();
  if (status.ok() && !active.done()) return;
  if (status.ok() && active.batch) status = engine_.Finish(*active.batch);
  const auto jobs = active.jobs();
  Leave(index);
  for (const auto& job : jobs) End(job, status);
}

void Scheduler::Leave(size_t index) {
  if (active_[index].batch) engine_.Leave(std::move(active_[index].batch));
  active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(index));
}

std::shared_ptr<Job> Scheduler::TakeWaiting(size_t index) {
  std::shared_ptr<Job> job = std::move(waiting_[index].job);
  waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(index));
  absl::MutexLock lock(&mutex_);  // `uploaded` is written under it
  StartClock(*job);
  const bool uploading = std::exchange(job->place, Job::Place::kNone) == Job::Place::kUploading;
  (uploading ? uploads_ : waiting_jobs_) -= 1;
  waiting_tokens_ -= uploading ? 0 : job->tokens();
  metrics_.uploads.Set(uploads_);
  metrics_.waiting.Set(waiting_jobs_);
  metrics_.queue_tokens.Set(static_cast<double>(waiting_tokens_));
  metrics_.running.Increment();
  return job;
}

// A started job leaves the server, behind its layers that are on their way.
void Scheduler::End(std::shared_ptr<Job> job, absl::Status result) {
  engine_.completions().Post(nullptr, [this, job = std::move(job), result = std::move(result)](
                                          const absl::Status&) { Finish(*job, result); });
}

// On the completion thread.
void Scheduler::Finish(Job& job, const absl::Status& result) {
  const bool committed = !job.prefill || job.prefill->committed.ok();
  absl::Status status = committed ? result : job.prefill->committed;
  if (status.ok() && job.prefill) status = job.prefill->model->CheckFiles();  // logits
  // Memory that the device or the host has not got now may be there later.
  if (absl::IsResourceExhausted(status) && !FactsOf(status).retry_after) {
    status = RetryLater(status.code(), "device_memory", status.message(), absl::Seconds(1));
  }
  metrics_.running.Decrement();
  if (status.ok()) metrics_.tokens_total.Increment(static_cast<double>(job.tokens()));
  if (job.prefill) {
    job.prefill->cache->SetOnSlotFree(nullptr);
    if (!status.ok()) job.prefill->cache->Fail(status);
  }
  for (size_t phase = 0; phase < job.phases.size(); ++phase) {
    if (job.phases[phase] > 0) metrics_.ObservePhase(static_cast<Phase>(phase), job.phases[phase]);
  }
  job.sink->OnFinished(status);
  absl::MutexLock lock(&mutex_);
  --jobs_;
  unretained_ -= Unretained(job) ? 1 : 0;
  ended_.SignalAll();
}

bool Scheduler::EndWherever(const std::shared_ptr<Job>& job, const absl::Status& status) {
  for (size_t i = 0; i < waiting_.size(); ++i) {
    if (waiting_[i].job != job) continue;
    End(TakeWaiting(i), status);
    return true;
  }
  for (size_t i = 0; i < active_.size(); ++i) {
    const auto jobs = active_[i].jobs();
    const auto found = std::find(jobs.begin(), jobs.end(), job);
    if (found == jobs.end()) continue;
    if (jobs.size() > 1) {
      engine_.Remove(*active_[i].batch, static_cast<size_t>(found - jobs.begin()));
    } else {
      Leave(i);
    }
    End(job, status);
    return true;
  }
  return false;
}

void Scheduler::PublishLoad() {
  double seconds = 0;
  for (const Active& active : active_) {
    for (const auto& job : active.jobs()) seconds += RemainingSeconds(active, *job);
  }
  for (const Waiting& waiting : waiting_) {
    if (waiting.ready) seconds += engine_.PredictSeconds(*waiting.job);
  }
  absl::MutexLock lock(&mutex_);
  backlog_seconds_ = seconds;
}

}  // namespace prefilld
