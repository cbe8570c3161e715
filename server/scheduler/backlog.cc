#include "server/scheduler/backlog.h"

#include <algorithm>

namespace prefilld {
namespace {

// Of the time that is left until a deadline: what may be spent in waiting and working by
// prediction. The rest is for what predictions are off by.
constexpr double kPlannedShare = 0.9;

// A promise, of the wait and the work that are predicted.
constexpr int kPromisedTimes = 4;
constexpr absl::Duration kPromisedMore = absl::Seconds(5);

SteadyTime DueOf(const Work& work) { return std::min(work.deadline, work.promise); }

}  // namespace

void Backlog::Add(const std::string& peer, const Work& work) {
  OfPeer& of = peers_[peer];
  of.work.push_back(work);
  of.total += work.remaining;
  of.share = work.share;
}

Outlook Backlog::OutlookOf(const std::string& peer, const Work& more, SteadyTime now) const {
  Outlook outlook;
  outlook.wait = WaitOf(peer, more, now);
  const SteadyTime earliest =
      now + kPromisedTimes * (outlook.wait + more.remaining) + kPromisedMore;
  outlook.promise = PromiseFrom(earliest, more.remaining, now);
  outlook.wait += (outlook.promise - earliest) / kPromisedTimes;
  const absl::Duration late = LateWith(peer, more, now);
  if (now + more.remaining > more.deadline) {
    outlook.answer = Outlook::Answer::kInfeasible;
  } else if (late > absl::ZeroDuration()) {
    outlook.answer = Outlook::Answer::kLater;
    outlook.retry_after = std::max(late, outlook.wait / 4);
  }
  return outlook;
}

// Each of the others has as much as it, by their shares, or all that it wants.
absl::Duration Backlog::EndOf(const std::string& peer, double share, absl::Duration needed) const {
  absl::Duration end = needed;
  for (const auto& [name, of] : peers_) {
    if (name != peer) end += std::min(of.total, needed * (of.share / share));
  }
  return end;
}

absl::Duration Backlog::WaitOf(const std::string& peer, const Work& more, SteadyTime now) const {
  absl::Duration before;
  const auto found = peers_.find(peer);
  if (found != peers_.end()) {
    const Rank rank = RankOf(more, now);
    for (const Work& work : found->second.work) {
      if (RankOf(work, now) < rank) before += work.remaining;
    }
  }
  return std::max(step_, EndOf(peer, more.share, before + more.remaining) - more.remaining);
}

// Each of those that are due later has to leave it twice its work.
SteadyTime Backlog::PromiseFrom(SteadyTime earliest, absl::Duration work, SteadyTime now) const {
  std::vector<const Work*> given;
  for (const auto& [name, of] : peers_) {
    for (const Work& other : of.work) {
      if (other.promise != absl::InfiniteFuture()) given.push_back(&other);
    }
  }
  std::sort(given.begin(), given.end(),
            [](const Work* a, const Work* b) { return a->promise < b->promise; });
  SteadyTime promise = earliest, busy = now;
  for (const Work* other : given) {
    busy += 2 * other->remaining;
    const bool in_its_way = other->promise >= promise && busy + 2 * work > other->promise;
    if (other->promise < promise || in_its_way) {
      promise = std::max({promise, other->promise, busy + 2 * work});
    }
  }
  return std::max(promise, now + 2 * work);
}

// By what is due first, which finds an order in time where there is one.
absl::Duration Backlog::LateWith(const std::string& peer, const Work& more, SteadyTime now) const {
  if (more.deadline == absl::InfiniteFuture()) return absl::ZeroDuration();
  std::vector<const Work*> behind;
  absl::Duration before;
  if (const auto found = peers_.find(peer); found != peers_.end()) {
    for (const Work& work : found->second.work) {
      if (DueOf(work) <= more.deadline) {
        before += work.remaining;
      } else if (DueOf(work) != absl::InfiniteFuture()) {
        behind.push_back(&work);
      }
    }
  }
  const absl::Duration end =
      std::max(step_ + more.remaining, EndOf(peer, more.share, before + more.remaining));
  // Who waits for nobody need not leave anything to what predictions are off by.
  const double planned = end > more.remaining ? kPlannedShare : 1;
  absl::Duration late = end - planned * (more.deadline - now);
  std::sort(behind.begin(), behind.end(),
            [](const Work* a, const Work* b) { return DueOf(*a) < DueOf(*b); });
  for (const Work* work : behind) {
    before += work->remaining;
    const absl::Duration left = DueOf(*work) - now;
    if (EndOf(peer, more.share, before) > left) continue;  // it is late without
    late = std::max(late, EndOf(peer, more.share, before + more.remaining) - left);
  }
  return std::max(late, absl::ZeroDuration());
}

}  // namespace prefilld
