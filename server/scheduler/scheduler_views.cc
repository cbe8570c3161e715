// What the scheduler could do next, as policy.h sees it.
#include <algorithm>
#include <set>

#include "server/kv/kv_cache.h"
#include "server/scheduler/scheduler.h"

namespace prefilld {

double Scheduler::RemainingSeconds(const Active& active, const Job& job) const {
  if (active.attend) {
    const auto parts = static_cast<double>(active.attend->parts.size());
    const auto done = static_cast<double>(active.attend->next_part);
    return engine_.PredictSeconds(job) * (parts - done) / parts;
  }
  const Batch& batch = *active.batch;
  const double layers = engine_.PredictSeconds(job, batch.next_layer);
  if (batch.scratch == nullptr) return layers;
  const auto done = static_cast<double>(batch.next_part) / static_cast<double>(batch.parts.size());
  return layers - done * engine_.PredictLayerSeconds(job);
}

bool Scheduler::Computable(const Active& active) const {
  if (active.attend) return true;
  const auto& jobs = active.batch->jobs;
  return std::all_of(jobs.begin(), jobs.end(), [&](const auto& job) {
    return job->prefill->cache->CanCompute(active.batch->next_layer);
  });
}

// The time that callers take to take their layers is no part of what was promised to them.
void Scheduler::NoteWaits(SteadyTime now) {
  for (Active& active : active_) {
    if (!Computable(active)) {
      if (!active.kept_waiting) active.kept_waiting = now;
    } else if (active.kept_waiting) {
      for (const auto& job : active.jobs()) job->promise += now - *active.kept_waiting;
      active.kept_waiting.reset();
    }
  }
}

// First what is in progress, then the waiting jobs.
std::vector<StepView> Scheduler::Views() const {
  std::vector<StepView> views;
  for (const Active& active : active_) {
    const auto jobs = active.jobs();
    StepView view{.work = {.arrival = absl::InfiniteFuture(), .priority = jobs[0]->priority},
                  .served = shares_.Served(jobs[0]->peer),
                  .runnable = !active.kept_waiting};
    for (const auto& job : jobs) {
      view.work.arrival = std::min(view.work.arrival, job->arrival);
      view.work.deadline = std::min(view.work.deadline, job->deadline.at());
      view.work.promise = std::min(view.work.promise, job->promise);
      view.work.priority = std::max(view.work.priority, job->priority);
      view.work.remaining += absl::Seconds(RemainingSeconds(active, *job));
      view.served = std::min(view.served, shares_.Served(job->peer));
    }
    if (active.batch && view.runnable && !engine_.CanStep(*active.batch)) {
      view.runnable = false;
      view.waits_for = HolderFor(active.batch->prompts.tokens());
    }
    views.push_back(view);
  }
  const Awaited awaited = AwaitedByPromises(SteadyNow());
  for (const Waiting& waiting : waiting_) {
    const Job& job = *waiting.job;
    const bool may_start = waiting.ready && MayStart(job, awaited);
    const bool must_wait = job.prefill && may_start && !engine_.CanStep(job.tokens());
    views.push_back({.work = {.arrival = job.arrival,
                              .deadline = job.deadline.at(),
                              .promise = waiting.ready ? job.promise : absl::InfiniteFuture(),
                              .remaining = absl::Seconds(engine_.PredictSeconds(job)),
                              .priority = job.priority},
                     .served = shares_.Served(job.peer),
                     .runnable = may_start && !must_wait,
                     .waits_for = must_wait ? HolderFor(job.tokens()) : std::nullopt});
  }
  return views;
}

// Who could run, or waits for one that does, has work.
void Scheduler::SetBusy(const std::vector<StepView>& views) {
  std::set<std::string> peers;
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i].runnable && !views[i].waits_for) continue;
    if (i >= active_.size()) {
      peers.insert(waiting_[i - active_.size()].job->peer);
    } else {
      for (const auto& job : active_[i].jobs()) peers.insert(job->peer);
    }
  }
  shares_.SetBusy(peers);
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

bool Scheduler::PromiseIsDue(const Job& job, SteadyTime now) const {
  return now + 2 * absl::Seconds(engine_.PredictSeconds(job)) >= job.promise;
}

bool Scheduler::MayStart(const Job& job, const Awaited& awaited) const {
  if (job.attend) return true;
  const bool promised = (awaited.room || awaited.blocks) && PromiseIsDue(job, SteadyNow());
  if (awaited.room && !promised && !Engine::Passes(job.tokens())) return false;
  const KvCache& cache = *job.prefill->cache;
  if (awaited.blocks && !promised && cache.blocks_awaited() > 0) return false;
  return HasRoom(*job.prefill->model, job.tokens(), cache.retain()) && HasBlocks(job);
}

bool Scheduler::HasRoom(const Transformer& model, int64_t tokens, bool retain) const {
  uint64_t all = 0, unretained = 0;
  for (const Active& active : active_) {
    if (!active.batch) continue;
    const Batch& batch = *active.batch;
    const uint64_t bytes = batch.model->BatchBytes(batch.prompts.tokens());
    all += bytes;
    unretained += batch.jobs[0]->prefill->cache->retain() ? 0 : bytes;
  }
  const uint64_t bytes = model.BatchBytes(tokens), most = options_.batch_bytes_max;
  const uint64_t left = Engine::Passes(tokens) ? 0 : model.BatchBytes(kShortBatchTokens);
  if (all > 0 && (bytes > most || all + bytes + left > most)) return false;
  if (!retain && unretained > 0 && unretained + bytes > most / 2) return false;
  return engine_.HasRoom(model, tokens);
}

bool Scheduler::HasBlocks(const Job& job) const {
  const KvCache& cache = *job.prefill->cache;
  const int64_t awaited = cache.blocks_awaited();
  return awaited == 0 || awaited <= cache.pool().free();
}

// Memory of batches and of caches comes back by itself while there are batches; blocks that are
// leased come back when their callers like, and are not waited for.
Scheduler::Awaited Scheduler::AwaitedByPromises(SteadyTime now) const {
  Awaited awaited;
  int64_t held = 0;
  for (const Active& active : active_) {
    if (!active.batch || active.kept_waiting) continue;
    for (const auto& job : active.batch->jobs) held += job->prefill->cache->blocks_held();
  }
  const bool any = std::any_of(active_.begin(), active_.end(), [](const Active& active) {
    return active.batch && !active.kept_waiting;
  });
  for (const Waiting& waiting : waiting_) {
    const Job& job = *waiting.job;
    if (!any || !job.prefill || !PromiseIsDue(job, now)) continue;
    const KvCache& cache = *job.prefill->cache;
    awaited.room |= !HasRoom(*job.prefill->model, job.tokens(), cache.retain());
    awaited.blocks |= !HasBlocks(job) && cache.blocks_awaited() <= cache.pool().free() + held;
  }
  return awaited;
}

}  // namespace prefilld
