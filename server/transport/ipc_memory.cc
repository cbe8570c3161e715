#include "server/transport/ipc_memory.h"

#include <sys/stat.h>

#include <fstream>

#include "absl/strings/str_cat.h"

namespace prefilld {

std::string CudaIpcDomain() {
  std::string host;
  struct stat info;
  if (!std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), host) || host.empty() ||
      stat("/proc/self/ns/pid", &info) != 0) {
    return "";
  }
  return absl::StrCat(host, ":", info.st_ino);
}

absl::StatusOr<std::shared_ptr<IpcMemory>> IpcMemory::Create(Device& device, uint64_t bytes) {
  auto memory = device.Allocate(bytes);
  if (!memory.ok()) return memory.status();
  auto handle = device.Export(*memory);
  if (!handle.ok()) return handle.status();
  return std::shared_ptr<IpcMemory>(
      new IpcMemory(*std::move(memory), *std::move(handle), std::string(device.uuid())));
}

}  // namespace prefilld
