#include "server/transport/ipc_memory.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/record/metrics.h"

namespace prefilld {
namespace {

constexpr char kHostId[] = "/proc/sys/kernel/random/boot_id";
constexpr char kProbe[] = "probe";

class IpcMemory final : public Region {
 public:
  IpcMemory(Buffer memory, std::string device_uuid, std::shared_ptr<RegionNames> names)
      : Region(Transport::kCudaIpc), memory_(std::move(memory)), names_(std::move(names)) {
    data_ = memory_.as<std::byte>();
    bytes_ = memory_.bytes();
    address_.device_uuid = std::move(device_uuid);
  }

  const Buffer& memory() const { return memory_; }
  std::shared_ptr<Region> Link(std::shared_ptr<Region> lent) override {
    address_.name = names_->Add(lent);
    Region* const region = lent.get();
    return {region, [lent = std::move(lent)](Region* unlinked) mutable {
              unlinked->Unlink();
              lent.reset();
            }};
  }
  void Unlink() override { names_->Remove(address_.name); }
  bool unmapped() const override { return true; }  // peers have shares, and all shares are gone

 private:
  const Buffer memory_;
  const std::shared_ptr<RegionNames> names_;
};

}  // namespace

std::string RegionNames::Add(const std::shared_ptr<Region>& region) {
  std::array<char, 16> bits;
  if (getrandom(bits.data(), bits.size(), 0) != static_cast<ssize_t>(bits.size())) return "";
  std::string name = absl::BytesToHexString(absl::string_view(bits.data(), bits.size()));
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

std::shared_ptr<Region> RegionNames::Find(const std::string& name) const {
  absl::MutexLock lock(&mutex_);
  const auto found = regions_.find(name);
  return found == regions_.end() ? nullptr : found->second.lock();
}

absl::StatusOr<std::unique_ptr<CudaIpc>> CudaIpc::Open(const MediumSite& site) {
  Device& device = site.device;
  if (device.uuid().empty()) {
    return absl::UnimplementedError(
        absl::StrCat("not possible on ", std::string(device.name()), ": it needs --backend=cuda"));
  }
  std::string domain;
  if (!std::getline(std::ifstream(kHostId), domain) || domain.empty()) {
    return absl::UnavailableError(absl::StrCat("cannot read ", kHostId));
  }
  std::unique_ptr<CudaIpc> medium(new CudaIpc(device, std::move(domain)));
  auto probe = medium->Create(1);
  if (!probe.ok()) return absl::UnavailableError(probe.status().message());
  medium->probe_ = *std::move(probe);
  medium->names_->Add(kProbe, medium->probe_);
  const auto tried = medium->HandOut(kProbe).descriptor;
  if (!tried.ok()) return absl::UnavailableError(tried.status().message());
  close(*tried);
  auto socket = DescriptorSocket::Listen(
      {.address = site.cuda_ipc_socket.empty() ? "@prefilld-" + site.owner : site.cuda_ipc_socket,
       .find = [m = medium.get()](const std::string& name) { return m->HandOut(name); },
       .told =
           [&metrics = site.metrics](DescriptorSocket::Outcome outcome) {
             metrics.DescriptorAsked(Metrics::kDescriptorOutcomes[static_cast<int>(outcome)]);
           },
       .connections = site.cuda_ipc_connections});
  if (!socket.ok()) {
    return absl::Status(socket.status().code(),
                        absl::StrCat("--cuda_ipc_socket: ", socket.status().message()));
  }
  medium->socket_ = *std::move(socket);
  return medium;
}

absl::StatusOr<std::shared_ptr<Region>> CudaIpc::Create(uint64_t bytes) {
  if (closed_) return absl::ResourceExhaustedError("the server is shutting down");
  auto memory = device_.AllocateShared(bytes);
  if (!memory.ok()) return memory.status();
  return std::make_shared<IpcMemory>(*std::move(memory), std::string(device_.uuid()), names_);
}

// One answer for names that never were, and those that are no more.
DescriptorSocket::Handout CudaIpc::HandOut(const std::string& name) const {
  std::shared_ptr<Region> region = names_->Find(name);
  if (region == nullptr) return {nullptr, 0, absl::NotFoundError("no memory has this name")};
  auto descriptor = device_.ExportShared(static_cast<const IpcMemory&>(*region).memory());
  const uint64_t bytes = region->bytes();
  return {std::move(region), bytes, std::move(descriptor)};
}

void CudaIpc::Introduce(PeerFacts* ours) const {
  ours->cuda_ipc_domain = domain_;
  ours->cuda_ipc_socket = socket_->address();
  ours->device_uuids.emplace_back(device_.uuid());
}

absl::Status CudaIpc::Reaches(const PeerFacts& peer) const {
  if (peer.cuda_ipc_domain != domain_) {
    return absl::FailedPreconditionError(absl::StrCat("cuda_ipc_domain '",
                                                      peer.cuda_ipc_domain.substr(0, 128),
                                                      "' is not the server's '", domain_, "'"));
  }
  const auto& uuids = peer.device_uuids;
  if (uuids.empty()) return absl::FailedPreconditionError("device_uuids: the caller names no GPU");
  if (std::find(uuids.begin(), uuids.end(), device_.uuid()) != uuids.end()) return absl::OkStatus();
  return absl::OutOfRangeError(absl::StrCat("the server computes on ", std::string(device_.uuid()),
                                            ", which is none of the caller's ", uuids.size(),
                                            " device_uuids"));
}

void CudaIpc::Close() {
  closed_ = true;
  socket_->Close();
}

absl::StatusOr<std::unique_ptr<Medium>> OpenCudaIpc(const MediumSite& site) {
  return CudaIpc::Open(site);
}

}  // namespace prefilld
