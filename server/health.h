// Whether the process lives, and whether it takes new work: the one answer behind gRPC's health,
// /healthz, /readyz and the metric. Who knows a fact says so, and takes it back. Thread-safe.
#pragma once

#include <array>
#include <functional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

class Health {
 public:
  // Why it does not; from kDeviceLost on it does not live either.
  enum Fact { kStarting, kDraining, kDeviceLost, kStalled, kModelChanged, kUnreachable };

  Health() { facts_[kStarting] = "starting"; }

  // `why` is for who asks; empty: it is not so any more.
  void Set(Fact fact, std::string why);
  // UNAVAILABLE says why not.
  absl::Status alive() const;
  absl::Status ready() const;

  // Called with every change, and at once; one call at a time.
  void Tell(std::function<void(bool alive, bool ready)> change);

 private:
  absl::Status From(int fact) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void Publish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;
  std::array<std::string, kUnreachable + 1> facts_ ABSL_GUARDED_BY(mutex_);
  std::function<void(bool, bool)> change_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
