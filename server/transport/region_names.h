// Which memory is handed out to whom: to those who know its name. A region gets a name for each new
// owner: 128 random bits, which nobody can guess, and which end with that owner. One table a
// server, for every transport whose regions are opened by descriptor. Shared with the regions,
// which may outlive the media. Thread-safe.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/transport/descriptor_socket.h"
#include "server/transport/region.h"

namespace prefilld {

class RegionNames {
 public:
  // A new name (capability.h).
  std::string Add(const std::shared_ptr<Region>& region);
  void Add(const std::string& name, const std::shared_ptr<Region>& region);
  void Remove(const std::string& name);
  // With a share of the region. One answer for names that never were, and those that are no more.
  DescriptorSocket::Handout HandOut(const std::string& name) const;

 private:
  mutable absl::Mutex mutex_;
  std::unordered_map<std::string, std::weak_ptr<Region>> regions_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
