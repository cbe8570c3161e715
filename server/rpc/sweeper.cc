#include "server/rpc/sweeper.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace prefilld {

Sweeper::~Sweeper() {
  stopping_.Ring();
  thread_.join();
}

void Sweeper::Loop() {
  std::vector<std::weak_ptr<Swept>> all;
  while (!stopping_.Await(SteadyNow() + every_)) {
    {
      absl::MutexLock lock(&mutex_);
      std::move(added_.begin(), added_.end(), std::back_inserter(all));
      added_.clear();
    }
    const auto gone = std::remove_if(all.begin(), all.end(), [](const auto& weak) {
      const auto swept = weak.lock();
      if (swept) swept->OnSweep();
      return swept == nullptr;
    });
    all.erase(gone, all.end());
  }
}

}  // namespace prefilld
