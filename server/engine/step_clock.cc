#include "server/engine/step_clock.h"

#include <utility>

namespace prefilld {

absl::Status StepClock::Start() {
  phases_.clear();
  return Record();
}

absl::Status StepClock::End(Phase phase) {
  phases_.push_back(phase);
  return Record();
}

absl::Status StepClock::Record() {
  if (phases_.size() == marks_.size()) {
    auto mark = device_.NewMark();
    if (!mark.ok()) return mark.status();
    marks_.push_back(*std::move(mark));
  }
  return marks_[phases_.size()]->Record(stream_);
}

absl::Status StepClock::AwaitEnd() { return marks_[phases_.size()]->Await(); }

absl::Status StepClock::Await(absl::Status enqueued) {
  absl::Status done = device_.Synchronize(stream_);
  return enqueued.ok() ? done : enqueued;
}

PhaseSeconds StepClock::Read() const {
  PhaseSeconds seconds{};
  for (size_t i = 0; i < phases_.size(); ++i) {
    Of(seconds, phases_[i]) += marks_[i + 1]->SecondsSince(*marks_[i]);
  }
  return seconds;
}

}  // namespace prefilld
