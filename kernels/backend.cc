#include "kernels/backend.h"

#include <omp.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"

namespace prefilld {
namespace {

constexpr int kThreadsMax = 1024;  // OpenMP ends the process when it cannot start a thread

}  // namespace

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(free_, other.free_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr && free_ != nullptr) free_(data_, bytes_);
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name, int threads) {
  const absl::string_view asked(name.data(), name.size());
  if (threads < 0 || threads > kThreadsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads ", threads, " is not between 0 and ", kThreadsMax));
  }
  if (name == "cpu" || name == "auto") {
    return std::make_unique<cpu::CpuBackend>(threads > 0 ? threads : omp_get_num_procs());
  }
  if (name == "cuda") {
    return absl::UnimplementedError("backend cuda is not in this build (cpu)");
  }
  return absl::InvalidArgumentError(
      absl::StrCat("backend \"", asked, "\" is unknown (auto, cpu, cuda)"));
}

}  // namespace prefilld
