#include "server/scheduler/policy.h"

#include <tuple>

namespace prefilld {
namespace {

// Slack below this share of the remaining work counts as danger: the estimate may be that far off.
constexpr double kDangerFactor = 1.0;

}  // namespace

std::optional<size_t> PickNext(const std::vector<StepView>& views, absl::Time now,
                               absl::Duration passed_over_max) {
  // Smaller is earlier, member by member.
  const auto key = [&](const StepView& view) {
    const absl::Duration waited = now - view.last_run;
    const bool starving = waited > passed_over_max;
    const absl::Duration slack = view.deadline - now - view.remaining;
    const bool danger = slack < kDangerFactor * view.remaining;
    return std::make_tuple(!starving, starving ? -waited : absl::ZeroDuration(), !danger,
                           danger ? slack : absl::ZeroDuration(), -view.priority, view.remaining,
                           view.arrival);
  };
  std::optional<size_t> best;
  for (size_t i = 0; i < views.size(); ++i) {
    if (!views[i].runnable) continue;
    if (!best || key(views[i]) < key(views[*best])) best = i;
  }
  return best;
}

}  // namespace prefilld
