// Which step runs next. Pure: views of what could run and the time go in, a choice comes out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <tuple>
#include <vector>

#include "absl/time/time.h"
#include "server/clock.h"

namespace prefilld {

// What there is to do for one caller.
struct Work {
  SteadyTime arrival;
  SteadyTime deadline = absl::InfiniteFuture();  // infinite when there is none
  // It is done by then, whoever comes, where every second step of the engine is left to promises.
  SteadyTime promise = absl::InfiniteFuture();
  absl::Duration remaining;  // predicted
  int priority = 0;
  double share = 1;  // of its peer, beside others'
};

// The order among the work of one peer, member by member, smaller is earlier: least slack (deadline
// - now - remaining, compared by its power of two; the most is no deadline, or one that leaves more
// than a minute and ten times the work), then higher priority, then less remaining work, so that a
// short prompt does not wait for a long one, then arrival.
using Rank = std::tuple<int, int, absl::Duration, SteadyTime>;
Rank RankOf(const Work& work, SteadyTime now);

// It can not be done in time any more, and need not be begun.
inline bool Hopeless(const Work& work, SteadyTime now) {
  return now + work.remaining > work.deadline;
}

// One thing the engine could do: the next step of what is in progress, or the start of a waiting
// job.
struct StepView {
  Work work;
  double served = 0;     // FairShares's, of its peer
  bool runnable = true;  // uploaded, and with room for its next step
  // It is not runnable because of what that view holds, which is as urgent as it, then.
  std::optional<size_t> waits_for;
};

struct Choice {
  size_t view = 0;
  bool promised = false;  // it goes before its turn
};

// The earliest promise, where one would be broken if they all had to wait for longer.
std::optional<size_t> DuePromise(const std::vector<StepView>& views, SteadyTime now);

// Order: the peer that was served least, and of its work the first by rank. Where `promises` have
// their turn, what DuePromise says goes before. Empty when nothing is runnable.
std::optional<Choice> PickNext(std::vector<StepView> views, SteadyTime now, bool promises);

// Promises have half of the engine's time at most: they never become the order.
class PromiseTurns {
 public:
  bool due() const { return ahead_ <= 0; }
  void Ran(bool promised, double seconds) {
    ahead_ = promised ? ahead_ + seconds : std::max(ahead_ - seconds, -seconds);
  }

 private:
  double ahead_ = 0;  // seconds that promises have had, and others have not
};

}  // namespace prefilld
