#include "kernels/backend.h"

#include <omp.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/faulty_backend.h"
#ifdef PREFILLD_CUDA
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/fault.h"
#endif

namespace prefilld {
namespace {

constexpr int kThreadsMax = 1024;  // OpenMP ends the process when it cannot start a thread

absl::StatusOr<std::unique_ptr<Backend>> CreateCuda([[maybe_unused]] const CudaOptions& options) {
#ifdef PREFILLD_CUDA
  return cuda::CudaBackend::Create(options);
#else
  return absl::UnimplementedError("backend cuda is not in this build (cpu)");
#endif
}

absl::Status NotShared(const Device& device) {
  return absl::UnimplementedError(absl::StrCat("memory of ", std::string(device.name()),
                                               " is not shared with other processes"));
}

// From what allocates: device or host memory.
template <typename Allocate>
absl::Status GrowBy(Device& device, Allocate&& allocate, size_t bytes, Buffer& buffer) {
  if (buffer.bytes() >= bytes) return absl::OkStatus();
  if (absl::Status released = Release(device, buffer); !released.ok()) return released;
  auto memory = allocate(bytes);
  if (!memory.ok()) return memory.status();
  buffer = *std::move(memory);
  return absl::OkStatus();
}

}  // namespace

absl::Status Grow(Device& device, size_t bytes, Buffer& buffer) {
  return GrowBy(
      device, [&](size_t size) { return device.Allocate(size); }, bytes, buffer);
}
absl::Status GrowHost(Device& device, size_t bytes, Buffer& buffer) {
  return GrowBy(
      device, [&](size_t size) { return device.AllocateHost(size); }, bytes, buffer);
}

absl::Status Release(Device& device, Buffer& buffer) {
  if (buffer.data() == nullptr) return absl::OkStatus();
  for (const Stream stream : {Stream{}, device.download_stream()}) {
    if (absl::Status done = device.Synchronize(stream); !done.ok()) return done;
  }
  buffer = Buffer();
  return absl::OkStatus();
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(free_, other.free_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr && free_ != nullptr) free_(data_, bytes_);
}

absl::Status Backend::SupportsPerHead(const AttentionShape&, const HeadPolicies&) const {
  return absl::UnimplementedError(
      absl::StrCat("policies that differ per head not supported by ", std::string(name())));
}

absl::StatusOr<Buffer> Device::AllocateShared(size_t) { return NotShared(*this); }
absl::StatusOr<int> Device::ExportShared(const Buffer&) { return NotShared(*this); }
absl::Status Device::Zero(void*, size_t) { return NotShared(*this); }

std::function<absl::Status()> FaultOf([[maybe_unused]] Device& device) {
#ifdef PREFILLD_CUDA
  if (auto* cuda = dynamic_cast<cuda::CudaDevice*>(&device)) {
    return [cuda] { return cuda->Check(cuda::WriteToNull(cuda->stream({})), "injected fault"); };
  }
#endif
  return nullptr;
}

std::function<absl::Status()> HangOf([[maybe_unused]] Device& device) {
#ifdef PREFILLD_CUDA
  if (auto* cuda = dynamic_cast<cuda::CudaDevice*>(&device)) {
    return [cuda] { return cuda->Check(cuda::NeverEnd(cuda->stream({})), "injected hang"); };
  }
#endif
  return [] {
    for (;;) absl::SleepFor(absl::Hours(1));
    return absl::OkStatus();
  };
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name, int threads,
                                                       const CudaOptions& cuda_options) {
  if (threads < 0 || threads > kThreadsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads ", threads, " is not between 0 and ", kThreadsMax));
  }
  if (name != "auto" && name != "cpu" && name != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("backend \"", std::string(name), "\" is unknown (auto, cpu, cuda)"));
  }
  if (name != "cpu") {
    auto cuda = CreateCuda(cuda_options);
    const bool none = absl::IsUnavailable(cuda.status()) || absl::IsUnimplemented(cuda.status());
    if (name == "cuda" || !none) return cuda;
  }
  // A product is shared out among as many threads as were asked for: with fewer (OMP_THREAD_LIMIT,
  // OMP_DYNAMIC) a part of it would not be computed.
  omp_set_dynamic(0);
  const int wanted = threads > 0 ? threads : omp_get_num_procs();
  return std::make_unique<cpu::CpuBackend>(std::min(wanted, omp_get_thread_limit()));
}

}  // namespace prefilld
