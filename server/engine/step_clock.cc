#include "server/engine/step_clock.h"

#include <utility>

namespace prefilld {

absl::Status StepClock::Start() {
  phases_.clear();
  absl::Status status = Record();
  begin_ = marks_.empty() ? nullptr : marks_[0].get();
  return status;
}

void StepClock::StartAfter(const StepClock& before) {
  phases_.clear();
  begin_ = &before.last();
}

absl::Status StepClock::End(Phase phase) {
  phases_.push_back(phase);
  return Record();
}

absl::Status StepClock::Record() {
  while (phases_.size() >= marks_.size()) {
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
    const Device::Mark& begin = i == 0 ? *begin_ : *marks_[i];
    Of(seconds, phases_[i]) += marks_[i + 1]->SecondsSince(begin);
  }
  return seconds;
}

}  // namespace prefilld
