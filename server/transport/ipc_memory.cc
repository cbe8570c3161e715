#include "server/transport/ipc_memory.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "server/transport/transports.h"

namespace prefilld {
namespace {

class IpcMemory final : public Region {
 public:
  IpcMemory(Buffer memory, std::string handle, std::string device_uuid)
      : Region(Transport::kCudaIpc), memory_(std::move(memory)) {
    data_ = memory_.as<std::byte>();
    bytes_ = memory_.bytes();
    address_.cuda_ipc_handle = std::move(handle);
    address_.device_uuid = std::move(device_uuid);
  }

 private:
  const Buffer memory_;
};

std::string Domain() {
  std::string host;
  struct stat info;
  if (!std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), host) || host.empty() ||
      stat("/proc/self/ns/pid", &info) != 0) {
    return "";
  }
  return absl::StrCat(host, ":", info.st_ino);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaIpc>> CudaIpc::Open(Device& device) {
  if (device.uuid().empty()) {
    return absl::UnimplementedError(
        absl::StrCat("not possible on ", std::string(device.name()), ": it needs --backend=cuda"));
  }
  std::string domain = Domain();
  if (domain.empty()) return absl::UnavailableError("the system names no boot or PID namespace");
  auto medium = std::make_unique<CudaIpc>(device, std::move(domain));
  if (auto memory = medium->Create(1); !memory.ok()) return memory.status();
  return medium;
}

absl::StatusOr<std::shared_ptr<Region>> CudaIpc::Create(uint64_t bytes) {
  auto memory = device_.Allocate(bytes);
  if (!memory.ok()) return memory.status();
  auto handle = device_.Export(*memory);
  if (!handle.ok()) return handle.status();
  return std::make_shared<IpcMemory>(*std::move(memory), *std::move(handle),
                                     std::string(device_.uuid()));
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
  if (std::find(uuids.begin(), uuids.end(), device_.uuid()) != uuids.end()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the server computes on ", std::string(device_.uuid()),
                   ", which is none of the caller's ", uuids.size(), " device_uuids"));
}

absl::StatusOr<std::unique_ptr<Medium>> OpenCudaIpc(const MediumSite& site) {
  return CudaIpc::Open(site.device);
}

}  // namespace prefilld
