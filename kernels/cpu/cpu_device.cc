#include "kernels/cpu/cpu_device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

std::string CpuModel() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "CPU";
}

// All work before it has run inline.
class SteadyMark : public Device::Mark {
 public:
  absl::Status Record(Stream) override {
    reached_ = std::chrono::steady_clock::now();
    return absl::OkStatus();
  }
  absl::Status Await() override { return absl::OkStatus(); }
  double SecondsSince(const Mark& earlier) const override {
    const auto begin = static_cast<const SteadyMark&>(earlier).reached_;
    return std::chrono::duration<double>(reached_ - begin).count();
  }

 private:
  std::chrono::steady_clock::time_point reached_;
};

}  // namespace

absl::StatusOr<Buffer> AllocatePages(size_t bytes) {
  if (bytes == 0) return Buffer();
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes: ", std::strerror(errno)));
  }
  return Buffer(data, bytes, [](void* mapped, size_t size) { munmap(mapped, size); });
}

CpuDevice::CpuDevice() : name_(absl::StrCat(CpuModel(), " (", InstructionSet(), ")")) {}

// The pages that lie in it whole; an error leaves them where they are, which is only a waste.
void CpuDevice::Discard(void* data, size_t bytes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

absl::Status CpuDevice::Copy(void* dst, const void* src, size_t bytes, Stream) {
  std::memcpy(dst, src, bytes);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Device::Mark>> CpuDevice::NewMark() {
  return std::make_unique<SteadyMark>();
}

}  // namespace prefilld::cpu
