#include "server/scheduler/fair_shares.h"

#include <algorithm>
#include <limits>

namespace prefilld {

void FairShares::SetBusy(const std::set<std::string>& peers) {
  if (peers.empty()) {  // nobody waits for what was taken
    served_.clear();
    return busy_.clear();
  }
  double least = std::numeric_limits<double>::infinity();  // of who had work until now
  for (const std::string& peer : busy_) least = std::min(least, Served(peer));
  if (!busy_.empty()) level_ = std::max(level_, least);
  busy_ = peers;
  for (const std::string& peer : peers) {
    double& served = served_.emplace(peer, level_).first->second;
    served = std::max(served, level_);
  }
  std::erase_if(served_, [&](const auto& entry) {
    return entry.second <= level_ && busy_.count(entry.first) == 0;
  });
}

double FairShares::Served(const std::string& peer) const {
  const auto found = served_.find(peer);
  return found == served_.end() ? level_ : found->second;
}

void FairShares::Serve(const std::string& peer, double seconds) {
  served_.emplace(peer, level_).first->second += seconds;
}

}  // namespace prefilld
