#include "server/health.h"

#include <utility>

namespace prefilld {

void Health::Set(Fact fact, std::string why) {
  absl::MutexLock lock(&mutex_);
  facts_[fact] = std::move(why);
  Publish();
}

absl::Status Health::alive() const {
  absl::MutexLock lock(&mutex_);
  return From(kDeviceLost);
}

absl::Status Health::ready() const {
  absl::MutexLock lock(&mutex_);
  return From(kStarting);
}

void Health::Tell(std::function<void(bool alive, bool ready)> change) {
  absl::MutexLock lock(&mutex_);
  change_ = std::move(change);
  Publish();
}

absl::Status Health::From(int fact) const {
  for (; fact <= kUnreachable; ++fact) {
    if (!facts_[fact].empty()) return absl::UnavailableError(facts_[fact]);
  }
  return absl::OkStatus();
}

void Health::Publish() {
  if (change_) change_(From(kDeviceLost).ok(), From(kStarting).ok());
}

}  // namespace prefilld
