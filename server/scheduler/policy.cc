#include "server/scheduler/policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

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

std::optional<size_t> PickNext(std::vector<StepView> views, SteadyTime now,
                               absl::Duration passed_over_max) {
  for (const StepView& view : views) {
    if (!view.waits_for) continue;
    StepView& holder = views[*view.waits_for];
    holder.priority = std::max(holder.priority, view.priority);
    holder.deadline = std::min(holder.deadline, view.deadline);
  }
  // Smaller is earlier, member by member.
  const auto key = [&](const StepView& view) {
    const absl::Duration waited = view.waited * view.parts;
    const bool starving = waited > passed_over_max;
    return std::make_tuple(!starving, starving ? -waited : absl::ZeroDuration(),
                           SlackClass(view.deadline - now - view.remaining, view.remaining),
                           -view.priority, view.remaining, view.arrival);
  };
  std::optional<size_t> best;
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i].runnable) continue;
    if (!best || key(views[i]) < key(views[*best])) best = i;
  }
  return best;
}

}  // namespace prefilld
