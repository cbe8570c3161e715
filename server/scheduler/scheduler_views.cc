// What the scheduler could do next, as policy.h sees it.
#include <algorithm>

#include "server/kv/kv_cache.h"
#include "server/scheduler/scheduler.h"

namespace prefilld {

double Scheduler::RemainingSeconds(const Active& active, const Job& job) const {
  if (active.batch) return engine_.PredictSeconds(job, active.batch->next_layer);
  const auto parts = static_cast<double>(active.attend->parts.size());
  const auto done = static_cast<double>(active.attend->next_part);
  return engine_.PredictSeconds(job) * (parts - done) / parts;
}

// First what is in progress, then the waiting jobs.
std::vector<StepView> Scheduler::Views() const {
  std::vector<StepView> views;
  int running[2] = {0, 0};  // batches: short ones, and long ones
  int waiting_for_consumers = 0;
  for (const Active& active : active_) {
    const auto jobs = active.jobs();
    StepView view;
    view.arrival = absl::InfiniteFuture();
    view.deadline = absl::InfiniteFuture();
    view.waited = Since(active.last_run);
    view.parts = active.begun() ? static_cast<int>(active.parts()) : 1;
    view.priority = jobs[0]->priority;
    for (const auto& job : jobs) {
      view.arrival = std::min(view.arrival, job->arrival);
      view.deadline = std::min(view.deadline, job->deadline.at());
      view.priority = std::max(view.priority, job->priority);
      view.remaining += absl::Seconds(RemainingSeconds(active, *job));
      view.runnable &= !active.batch || job->prefill->cache->CanCompute(active.batch->next_layer);
    }
    if (active.batch) {
      waiting_for_consumers += view.runnable ? 0 : 1;
      // Batches that wait for their consumer do not keep others from starting, up to a point: each
      // holds its residual stream.
      running[Engine::Passes(active.batch->prompts.tokens()) ? 0 : 1] += view.runnable ? 1 : 0;
      if (view.runnable && !engine_.CanStep(*active.batch)) {
        view.runnable = false;
        view.waits_for = HolderFor(active.batch->prompts.tokens());
      }
    }
    views.push_back(view);
  }
  const bool any = running[0] + running[1] > 0;
  const bool room_is_awaited = any && RoomIsAwaited();
  const auto may_start_batch = [&](bool passes) {
    const int begun = static_cast<int>(active_.size()) - waiting_for_consumers;
    if (begun >= options_.waiting_jobs_max) return false;
    // Long ones do not keep short ones from starting, nor does one that waits for memory: they
    // leave it the room that is planned for it.
    const int most = options_.active_batches_max - (passes && room_is_awaited ? 1 : 0);
    return running[passes ? 0 : 1] < most && (passes || !room_is_awaited);
  };
  for (const Waiting& waiting : waiting_) {
    const Job& job = *waiting.job;
    const bool may_start =
        job.attend || (may_start_batch(Engine::Passes(job.tokens())) && HasRoom(job));
    const bool must_wait = job.prefill && may_start && !engine_.CanStep(job.tokens());
    views.push_back({.arrival = job.arrival,
                     .waited = Since(job.arrival),
                     .deadline = job.deadline.at(),
                     .remaining = absl::Seconds(engine_.PredictSeconds(job)),
                     .priority = job.priority,
                     .runnable = waiting.ready && may_start && !must_wait,
                     .waits_for = must_wait ? HolderFor(job.tokens()) : std::nullopt});
  }
  return views;
}

// The batch in the middle of a layer that one of so many tokens waits for.
std::optional<size_t> Scheduler::HolderFor(int64_t tokens) const {
  for (size_t i = 0; i < active_.size(); ++i) {
    const Batch* batch = active_[i].batch.get();
    const bool holds = batch != nullptr && batch->scratch != nullptr;
    if (holds && Engine::Passes(batch->prompts.tokens()) == Engine::Passes(tokens)) return i;
  }
  return std::nullopt;
}

bool Scheduler::HasRoom(const Job& job) const {
  return engine_.HasRoom(*job.prefill->model, job.tokens());
}

// A long prompt has waited long for the memory of batches: nobody takes what becomes free before
// it, while there are batches that will end by themselves.
bool Scheduler::RoomIsAwaited() const {
  return std::any_of(waiting_.begin(), waiting_.end(), [this](const Waiting& waiting) {
    const Job& job = *waiting.job;
    return job.prefill && Since(job.arrival) > options_.passed_over_max && !HasRoom(job);
  });
}

}  // namespace prefilld
