#include "server/transport/region_names.h"

#include <utility>

#include "server/capability.h"

namespace prefilld {

std::string RegionNames::Add(const std::shared_ptr<Region>& region) {
  std::string name = CapabilityName(RandomBits());
  Add(name, region);
  return name;
}

void RegionNames::Add(const std::string& name, const std::shared_ptr<Region>& region) {
  absl::MutexLock lock(&mutex_);
  regions_[name] = region;
}

void RegionNames::Remove(const std::string& name) {
  absl::MutexLock lock(&mutex_);
  regions_.erase(name);
}

DescriptorSocket::Handout RegionNames::HandOut(const std::string& name) const {
  std::shared_ptr<Region> region;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = regions_.find(name);
    if (found != regions_.end()) region = found->second.lock();
  }
  if (region == nullptr) return {nullptr, 0, absl::NotFoundError("no memory has this name")};
  auto descriptor = region->Descriptor();
  const uint64_t bytes = region->bytes();
  return {std::move(region), bytes, std::move(descriptor)};
}

std::shared_ptr<Region> Region::Link(std::shared_ptr<Region> region) {
  region->address_.name = region->names_->Add(region);
  Region* const raw = region.get();
  return {raw, [region = std::move(region)](Region* linked) mutable {
            linked->Unlink();
            region.reset();
          }};
}

void Region::Unlink() { names_->Remove(address_.name); }

}  // namespace prefilld
