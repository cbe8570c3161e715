// What the scheduler's thread is waiting for, told to who asks whether it moves.
#include <algorithm>

#include "server/scheduler/scheduler.h"

namespace prefilld {
namespace {

// A step that takes so many times its prediction does not end.
constexpr double kStalledFactor = 20;

}  // namespace

std::optional<StalledStep> Scheduler::Stalled(absl::Duration least, absl::Duration period) {
  absl::MutexLock lock(&mutex_);
  const absl::Duration seen = step_watch_.Look(step_started_, SteadyNow(), period);
  if (seen <= std::max(least, kStalledFactor * step_predicted_)) return std::nullopt;
  return StalledStep{.parts = step_parts_, .waited = seen, .predicted = step_predicted_};
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

}  // namespace prefilld
