#include "server/scheduler/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/kv/kv_cache.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

void StartClock(Job& job) {
  const SteadyTime now = SteadyNow();
  const SteadyTime ready = job.attend ? std::min(job.uploaded, now) : job.arrival;
  job.phases[static_cast<size_t>(Phase::kQueue)] = absl::ToDoubleSeconds(now - ready);
  job.phases[static_cast<size_t>(Phase::kUpload)] = absl::ToDoubleSeconds(ready - job.arrival);
}

bool MayShareBatch(const Job& a, const Job& b) {
  return b.prefill && a.prefill->model == b.prefill->model && a.policy == b.policy &&
         a.method_unspecified == b.method_unspecified && a.prefill->cache->retain() &&
         b.prefill->cache->retain();  // a batch never waits for one job's consumer
}

}  // namespace

Scheduler::Scheduler(Engine& engine, Metrics& metrics, SchedulerOptions options)
    : engine_(engine),
      metrics_(metrics),
      options_(options),
      admission_(options, metrics),
      thread_([this] { Loop(); }) {}

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
  const absl::Duration work = absl::Seconds(engine_.PredictSeconds(job));
  absl::MutexLock lock(&mutex_);
  return CheckOpenLocked(job, work);
}

absl::Status Scheduler::CheckOpenLocked(const Job& job, absl::Duration work) const {
  if (draining_ || stop_) return Draining();
  if (absl::Status lost = engine_.CheckDevice(); !lost.ok()) return lost;
  absl::Status status = admission_.Check(job, work);
  if (FactsOf(status).reason == kDeadlineInfeasible && !refused_as_infeasible_.exchange(true)) {
    bell_->Ring();
  }
  return status;
}

std::shared_ptr<void> Scheduler::TakeAhead(const BlockPool& pool, int64_t blocks) {
  absl::MutexLock lock(&mutex_);
  const int64_t ahead = admission_.BlocksAhead() + *ahead_;
  if (ahead != 0 && 4 * (ahead + blocks) > pool.total()) return nullptr;
  *ahead_ += blocks;
  return std::shared_ptr<int64_t>(new int64_t(blocks), [all = ahead_](const int64_t* taken) {
    *all -= *taken;
    delete taken;
  });
}

absl::Status Scheduler::Admit(const std::shared_ptr<Job>& job) {
  if (absl::Status status = engine_.CheckFits(*job); !status.ok()) return status;
  const absl::Duration work = absl::Seconds(engine_.PredictSeconds(*job));
  const auto ring = [bell = bell_] { bell->Ring(); };
  if (job->prefill) job->prefill->cache->pool().SetOnGiveBack(ring);
  absl::MutexLock lock(&mutex_);
  absl::Status status = CheckOpenLocked(*job, work);
  if (status.ok()) status = admission_.Take(*job, work);
  if (!status.ok()) return status;
  if (job->prefill) job->prefill->cache->SetOnSlotFree(ring);
  inbox_.push_back({What::kAdmit, job, absl::OkStatus()});
  bell_->Ring();
  return absl::OkStatus();
}

void Scheduler::UploadDone(const std::shared_ptr<Job>& job) {
  const absl::Duration work = absl::Seconds(engine_.PredictSeconds(*job));
  absl::MutexLock lock(&mutex_);
  admission_.Uploaded(*job, work);
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
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return admission_.jobs() == 0; };
  return ended_.AwaitUntil(deadline, mutex_, idle);
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
    if (RunOneStep()) continue;
    const bool idle = waiting_.empty() && active_.empty();
    const SteadyTime next = idle ? MeasureAgain() : absl::InfiniteFuture();
    bell_->Await(std::min(NextDeadline(), next));
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

// Before it starts, what cannot be done in time any more is not begun; what has begun may still be
// faster than predicted.
void Scheduler::DropLate(SteadyTime now) {
  constexpr double kFasterAtMost = 0.5;
  std::vector<std::shared_ptr<Job>> late, hopeless;
  for (const Waiting& waiting : waiting_) {
    const SteadyTime deadline = waiting.job->deadline.at();
    const double seconds = waiting.ready ? engine_.PredictSeconds(*waiting.job) : 0;
    if (now + absl::Seconds(seconds) >= deadline) {
      (now >= deadline ? late : hopeless).push_back(waiting.job);
    }
  }
  for (const Active& active : active_) {
    for (const auto& job : active.jobs()) {
      const double seconds = kFasterAtMost * RemainingSeconds(active, *job);
      if (now >= job->deadline.at()) {
        late.push_back(job);
      } else if (now + absl::Seconds(seconds) >= job->deadline.at()) {
        hopeless.push_back(job);
      }
    }
  }
  for (const auto& job : late) {
    EndWherever(job, absl::DeadlineExceededError("the deadline passed before the work was done"));
  }
  for (const auto& job : hopeless) {
    EndWherever(job, absl::DeadlineExceededError("the work would not be done by the deadline"));
  }
}

// A machine may have been busy with something else when it was measured: it is looked at again,
// ever more seldom, and when somebody was refused for what was measured. Returns when next.
SteadyTime Scheduler::MeasureAgain() {
  constexpr absl::Duration kFirst = absl::Milliseconds(500);
  if (!options_.measures_again || !engine_.recalibrates()) return absl::InfiniteFuture();
  const bool asked = refused_as_infeasible_;
  SteadyTime next = measured_ + (asked ? kFirst : measure_again_in_);
  if (SteadyNow() < next) return next;
  engine_.Recalibrate();
  refused_as_infeasible_ = false;
  measure_again_in_ = asked ? kFirst : 2 * measure_again_in_;
  measured_ = SteadyNow();
  return measured_ + measure_again_in_;
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
  NoteWaits(SteadyNow());
  const std::vector<StepView> views = Views();
  SetBusy(views);
  const auto choice = PickNext(views, SteadyNow(), turns_.due());
  const auto next = choice ? std::optional(choice->view) : std::nullopt;
  NoteParts(next);
  {
    absl::MutexLock lock(&mutex_);
    step_started_ = SteadyNow();
    if (next) step_predicted_ = Predict(*next);  // else of what is on its way
    // What starts is not in parts yet; they take no longer, where it can be divided.
    constexpr absl::Duration kPartAtMost = absl::Seconds(1);
    const bool starts = next && *next >= active_.size();
    const absl::Duration most = starts ? kPartAtMost : absl::InfiniteDuration();
    if (next) admission_.SetStep(*step_started_, std::min(step_predicted_, most));
  }
  bool ran = true;
  if (!next) {
    ran = engine_.Settle();
  } else {
    promised_ = choice->promised;
    if (*next < active_.size()) {
      Advance(*next);
    } else if (waiting_[*next - active_.size()].job->attend) {
      StartAttend(*next - active_.size());
    } else {
      StartBatch(*next - active_.size());
    }
  }
  absl::MutexLock lock(&mutex_);
  step_started_.reset();
  return ran;
}

// The chosen job, and short ones that may come along while the budgets last, of tokens and of the
// time that the first then waits for the others.
void Scheduler::StartBatch(size_t first) {
  constexpr double kBatchSeconds = 0.5;
  // Somebody else may have had them since it was looked: then it goes on to wait.
  if (!waiting_[first].job->prefill->cache->TakeBlocks().ok()) return;
  std::vector<std::shared_ptr<Job>> jobs = {TakeWaiting(first)};
  int64_t tokens = jobs[0]->tokens();
  double seconds = engine_.PredictSeconds(*jobs[0]);
  for (size_t i = 0; i < waiting_.size();) {
    const Job& other = *waiting_[i].job;
    const double more = engine_.PredictSeconds(other);
    if (waiting_[i].ready && MayShareBatch(*jobs[0], other) &&
        tokens + other.tokens() <= options_.batch_tokens_max && seconds + more <= kBatchSeconds &&
        engine_.CanStep(tokens + other.tokens()) &&
        HasRoom(*other.prefill->model, tokens + other.tokens(), /*retain=*/true) &&
        other.prefill->cache->TakeBlocks().ok()) {
      tokens += other.tokens();
      seconds += more;
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
  active_.push_back({.batch = *std::move(batch)});
  NoteParts(active_.size() - 1);  // with all of its jobs
  Advance(active_.size() - 1);
}

void Scheduler::StartAttend(size_t index) {
  active_.push_back({.attend = engine_.BeginAttend(TakeWaiting(index))});
  {
    absl::MutexLock lock(&mutex_);
    admission_.SetStep(*step_started_, Predict(active_.size() - 1));
  }
  Advance(active_.size() - 1);
}

void Scheduler::Advance(size_t index) {
  Active& active = active_[index];
  absl::Status status =
      active.batch ? engine_.RunStep(*active.batch) : engine_.RunStep(*active.attend);
  Charge(active);
  if (status.ok() && !active.done()) return;
  if (status.ok() && active.batch) status = engine_.Finish(*active.batch);
  const auto jobs = active.jobs();
  Leave(index);
  for (const auto& job : jobs) End(job, status);
}

// A step was taken, for these peers.
void Scheduler::Charge(const Active& active) {
  double all = 0;
  absl::MutexLock lock(&mutex_);
  for (const auto& job : active.jobs()) {
    const double whole =
        job->attend ? engine_.PredictSeconds(*job) : engine_.PredictLayerSeconds(*job);
    const double seconds = whole / static_cast<double>(active.parts());
    shares_.Serve(job->peer, seconds / job->share);
    admission_.Progressed(*job, absl::Seconds(RemainingSeconds(active, *job)));
    all += seconds;
  }
  turns_.Ran(promised_, all);
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
  admission_.Started(*job);
  metrics_.running.Increment();
  return job;
}

// A started job leaves the server, behind its layers that are on their way.
void Scheduler::End(std::shared_ptr<Job> job, absl::Status result) {
  {
    absl::MutexLock lock(&mutex_);
    admission_.Progressed(*job, absl::ZeroDuration());
  }
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
  admission_.Ended(job);
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

}  // namespace prefilld
