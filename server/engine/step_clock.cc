#include "server/engine/step_clock.h"

#include <numeric>
#include <utility>

namespace prefilld {

absl::Status StepClock::Start() {
  phases_.clear();
  like_.reset();
  absl::Status status = Record();
  begin_ = marks_.empty() ? nullptr : marks_[0].get();
  return status;
}

void StepClock::StartAfter(const StepClock& before) {
  phases_.clear();
  like_.reset();
  begin_ = &before.end();
}

void StepClock::MarkTheEndOnly(const PhaseSeconds& like) { like_ = like; }

absl::Status StepClock::End(Phase phase) { return like_ ? absl::OkStatus() : Finish(phase); }

absl::Status StepClock::Finish(Phase phase) {
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
  if (!like_) return seconds;
  const double all = std::accumulate(seconds.begin(), seconds.end(), 0.0);
  const double of_like = std::accumulate(like_->begin(), like_->end(), 0.0);
  if (of_like <= 0) return seconds;
  for (size_t phase = 0; phase < seconds.size(); ++phase) {
    seconds[phase] = all * (*like_)[phase] / of_like;
  }
  return seconds;
}

}  // namespace prefilld
