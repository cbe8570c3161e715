// How long a step has run, as one sees who looks at it once a period. A process that stands still
// (SIGSTOP, a frozen container, a closed lid) is not looked at: of what lies between two looks no
// more than two periods count. One thread at a time.
#pragma once

#include <algorithm>
#include <optional>

#include "absl/time/time.h"
#include "server/clock.h"

namespace prefilld {

class StepWatch {
 public:
  // What has been seen of the step that runs since `began`, which names it, or since nothing runs.
  absl::Duration Look(std::optional<SteadyTime> began, SteadyTime now, absl::Duration period) {
    if (began != began_) seen_ = absl::ZeroDuration();
    if (began) {
      const SteadyTime since = began == began_ ? looked_ : *began;
      seen_ += std::min(now - since, 2 * period);
    }
    began_ = began;
    looked_ = now;
    return seen_;
  }

 private:
  std::optional<SteadyTime> began_;
  SteadyTime looked_;
  absl::Duration seen_;
};

}  // namespace prefilld
