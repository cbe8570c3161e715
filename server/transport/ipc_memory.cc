#include "server/transport/ipc_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "server/transport/transports.h"

namespace prefilld {
namespace {

constexpr char kHostId[] = "/proc/sys/kernel/random/boot_id";
constexpr char kProbe[] = "probe";

class IpcMemory final : public Region {
 public:
  IpcMemory(Device& device, Buffer memory, std::shared_ptr<RegionNames> names)
      : Region(Transport::kCudaIpc, std::move(names)), device_(device), memory_(std::move(memory)) {
    data_ = memory_.as<std::byte>();
    bytes_ = memory_.bytes();
    address_.device_uuid = std::string(device.uuid());
  }

  absl::StatusOr<int> Descriptor() const override { return device_.ExportShared(memory_); }

 private:
  Device& device_;
  const Buffer memory_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaIpc>> CudaIpc::Open(Device& device,
                                                       std::shared_ptr<RegionNames> names) {
  if (device.uuid().empty()) {
    return absl::UnimplementedError(
        absl::StrCat("not possible on ", std::string(device.name()), ": it needs --backend=cuda"));
  }
  std::string domain;
  if (!std::getline(std::ifstream(kHostId), domain) || domain.empty()) {
    return absl::UnavailableError(absl::StrCat("cannot read ", kHostId));
  }
  std::unique_ptr<CudaIpc> medium(new CudaIpc(device, std::move(domain), std::move(names)));
  auto probe = medium->Create(1, PeerAccess::kReadAndWrite);
  if (!probe.ok()) return absl::UnavailableError(probe.status().message());
  medium->probe_ = *std::move(probe);
  const auto tried = medium->probe_->Descriptor();
  if (!tried.ok()) return absl::UnavailableError(tried.status().message());
  close(*tried);
  medium->names_->Add(kProbe, medium->probe_);
  return medium;
}

absl::StatusOr<std::shared_ptr<Region>> CudaIpc::Create(uint64_t bytes, PeerAccess) {
  if (closed_) return absl::ResourceExhaustedError("the server is shutting down");
  auto memory = device_.AllocateShared(bytes);
  if (!memory.ok()) return memory.status();
  return std::make_shared<IpcMemory>(device_, *std::move(memory), names_);
}

void CudaIpc::Introduce(PeerFacts* ours) const {
  ours->cuda_ipc_domain = domain_;
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

absl::StatusOr<std::unique_ptr<Medium>> OpenCudaIpc(const MediumSite& site) {
  return CudaIpc::Open(site.device, site.names);
}

}  // namespace prefilld
