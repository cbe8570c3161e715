#include "server/scheduler/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace prefilld {
namespace {

// A deadline is far that leaves a minute, and ten times the work, to others.
constexpr absl::Duration kFarSlack = absl::Minutes(1);
constexpr int kFarTimes = 10;

// Slack by its power of two in seconds, so that two deadlines that differ by the milliseconds
// between two arrivals leave the choice to priority. Slack that is used up is the most urgent; a
// deadline that is far is none.
int SlackClass(absl::Duration slack, absl::Duration remaining) {
  if (slack > std::max(kFarSlack, kFarTimes * remaining)) return std::numeric_limits<int>::max();
  const double seconds = absl::ToDoubleSeconds(slack);
  return seconds <= 0 ? std::numeric_limits<int>::min() : std::ilogb(seconds);
}

}  // namespace

Rank RankOf(const Work& work, SteadyTime now) {
  return {SlackClass(work.deadline - now - work.remaining, work.remaining), -work.priority,
          work.remaining, work.arrival};
}

std::optional<size_t> DuePromise(const std::vector<StepView>& views, SteadyTime now) {
  std::vector<size_t> order(views.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return views[a].work.promise < views[b].work.promise; });
  std::optional<size_t> first;
  absl::Duration ahead;
  for (const size_t i : order) {
    if (!views[i].runnable) continue;
    if (!first) first = i;
    ahead += views[i].work.remaining;
    if (now + 2 * ahead >= views[i].work.promise) return first;
  }
  return std::nullopt;
}

std::optional<Choice> PickNext(std::vector<StepView> views, SteadyTime now, bool promises) {
  for (const StepView& view : views) {
    if (!view.waits_for) continue;
    StepView& holder = views[*view.waits_for];
    holder.served = std::min(holder.served, view.served);
    holder.work.promise = std::min(holder.work.promise, view.work.promise);
    holder.work.priority = std::max(holder.work.priority, view.work.priority);
    holder.work.deadline = std::min(holder.work.deadline, view.work.deadline);
  }
  if (promises) {
    if (const auto due = DuePromise(views, now)) return Choice{*due, true};
  }
  std::optional<size_t> best;
  Rank best_rank;
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i].runnable) continue;
    if (best && views[i].served > views[*best].served) continue;
    const Rank rank = RankOf(views[i].work, now);
    if (!best || views[i].served < views[*best].served || rank < best_rank) {
      best = i;
      best_rank = rank;
    }
  }
  if (!best) return std::nullopt;
  return Choice{*best, false};
}

}  // namespace prefilld
