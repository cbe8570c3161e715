// Which step runs next. Pure: views of what could run and the time go in, a choice comes out.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "absl/time/time.h"
#include "server/clock.h"

namespace prefilld {

// One thing the engine could do: the next step of what is in progress, or the start of a waiting
// job.
struct StepView {
  SteadyTime arrival;
  absl::Duration waited;     // since its last step, or arrival
  int parts = 1;             // of the layer, or the Attend, that it is in the middle of
  SteadyTime deadline;       // infinite when there is none
  absl::Duration remaining;  // predicted work until it is done
  int priority = 0;
  bool runnable = true;  // uploaded, and with room for its next step
  // It is not runnable because of what that view holds, which is as urgent as it, then.
  std::optional<size_t> waits_for;
};

// Order: what has been passed over for longer than `passed_over_max` first (longest first; in the
// middle of a layer, for its share of that: a layer of many parts gets on as one of one does), then
// least slack (deadline - now - remaining, compared by its power of two; the most is no deadline,
// or one that leaves more than a minute and ten times the work), then higher priority, then less
// remaining work, so that a short prompt does not wait for a long one, then arrival. Empty when
// nothing is runnable.
std::optional<size_t> PickNext(std::vector<StepView> views, SteadyTime now,
                               absl::Duration passed_over_max);

}  // namespace prefilld
