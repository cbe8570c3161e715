#include "server/scheduler/policy.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace prefilld {
namespace {

// Slack by its power of two in seconds, so that two deadlines that differ by the milliseconds
// between two arrivals leave the choice to priority. Slack that is used up is the most urgent.
int SlackClass(absl::Duration slack) {
  if (slack == absl::InfiniteDuration()) return std::numeric_limits<int>::max();
  const double seconds = absl::ToDoubleSeconds(slack);
  return seconds <= 0 ? std::numeric_limits<int>::min() : std::ilogb(seconds);
}

}  // namespace

std::optional<size_t> PickNext(const std::vector<StepView>& views, absl::Time now,
                               absl::Duration passed_over_max) {
  // Smaller is earlier, member by member.
  const auto key = [&](const StepView& view) {
    const absl::Duration waited = view.waited * view.parts;
    const bool starving = waited > passed_over_max;
    return std::make_tuple(!starving, starving ? -waited : absl::ZeroDuration(),
                           SlackClass(view.deadline - now - view.remaining), -view.priority,
                           view.remaining, view.arrival);
  };
  std::optional<size_t> best;
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i].runnable) continue;
    if (!best || key(views[i]) < key(views[*best])) best = i;
  }
  return best;
}

}  // namespace prefilld
