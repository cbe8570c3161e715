// Where the time of a step goes, on the device's clock: every phase ends at a mark in the stream,
// and all are read after the step's one wait. A mark costs the device some 3 us, as much as a small
// kernel: there is none where nothing was enqueued, and a step that is like another may have one
// alone. One clock a step that is on its way. Owned by the engine, whose thread alone uses it.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/job.h"

namespace prefilld {

class StepClock {
 public:
  StepClock(Device& device, Stream stream) : device_(device), stream_(stream) {}

  // A step begins: what is enqueued from now on belongs to its first phase.
  absl::Status Start();
  // It begins where another one ends, which is not recorded again before this one is read.
  void StartAfter(const StepClock& before);
  // After either: the step has a mark at its end alone, and its time is divided as `like` is.
  void MarkTheEndOnly(const PhaseSeconds& like);
  // What was enqueued since Start, or the last End, is of this phase.
  absl::Status End(Phase phase);
  // Of the last phase.
  absl::Status Finish(Phase phase);
  // Until the last phase that has ended is done, whatever is enqueued behind it.
  absl::Status AwaitEnd();
  // Until all of the stream is done, also what was enqueued of a step that failed half way
  // (`enqueued` says why): it uses memory that its caller may give back. The first that went wrong
  // of both.
  absl::Status Await(absl::Status enqueued);
  // Where the last phase ends, or the step begins.
  const Device::Mark& end() const { return phases_.empty() ? *begin_ : *marks_[phases_.size()]; }
  // Of all phases that have ended since Start; after a wait.
  PhaseSeconds Read() const;

 private:
  absl::Status Record();

  Device& device_;
  const Stream stream_;
  std::vector<std::unique_ptr<Device::Mark>> marks_;  // as many as the longest step needs
  std::vector<Phase> phases_;                         // phases_[i] ends at marks_[i + 1]
  const Device::Mark* begin_ = nullptr;               // of the first: marks_[0], or another's last
  std::optional<PhaseSeconds> like_;                  // the end alone is marked
};

inline double& Of(PhaseSeconds& phases, Phase phase) { return phases[static_cast<size_t>(phase)]; }
inline double Of(const PhaseSeconds& phases, Phase phase) {
  return phases[static_cast<size_t>(phase)];
}
inline void Add(const PhaseSeconds& more, PhaseSeconds& phases) {
  for (size_t phase = 0; phase < phases.size(); ++phase) phases[phase] += more[phase];
}

}  // namespace prefilld
