// All work that there is, and when more of it would be done: the answer to a deadline at admission,
// by the order that policy.h keeps. Pure.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/clock.h"
#include "server/scheduler/policy.h"

namespace prefilld {

// What work has to expect.
struct Outlook {
  enum class Answer { kInTime, kInfeasible, kLater };
  Answer answer = Answer::kInTime;  // its own time is too long, or only that of others
  absl::Duration wait;
  absl::Duration retry_after;  // of kLater: when there may be room for it
  // No more than four times the wait and its own work from now, and five seconds; and no promise
  // that was given before is broken for it.
  SteadyTime promise;
};

class Backlog {
 public:
  // step: what is left of the one that runs, which nobody passes.
  explicit Backlog(absl::Duration step = absl::ZeroDuration()) : step_(step) {}

  void Add(const std::string& peer, const Work& work);

  // Whether it would be done in time, and with it all that would be without.
  Outlook OutlookOf(const std::string& peer, const Work& more, SteadyTime now) const;
  // The first promise from `earliest` on that can be kept beside those that were given.
  SteadyTime PromiseFrom(SteadyTime earliest, absl::Duration work, SteadyTime now) const;

 private:
  struct OfPeer {
    std::vector<Work> work;
    absl::Duration total;
    double share = 1;
  };
  // How long `more` will wait for others: for what its peer has that ranks before it, and for what
  // other peers' shares are meanwhile.
  absl::Duration WaitOf(const std::string& peer, const Work& more, SteadyTime now) const;
  // By how much `more` would be late, or with it work of its peer that is in time without.
  absl::Duration LateWith(const std::string& peer, const Work& more, SteadyTime now) const;
  // When a peer of this share has had so much of the engine, if it always has work.
  absl::Duration EndOf(const std::string& peer, double share, absl::Duration needed) const;

  const absl::Duration step_;
  std::map<std::string, OfPeer> peers_;
};

}  // namespace prefilld
