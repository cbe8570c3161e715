#include "kernels/faulty_backend.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace prefilld {

absl::StatusOr<std::unique_ptr<FaultyBackend>> FaultyBackend::Create(
    std::unique_ptr<Backend> backend) {
  auto fault = FaultOf(backend->device());
  if (fault == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("backend ", std::string(backend->name()), " has no fault to inject"));
  }
  return std::make_unique<FaultyBackend>(std::move(backend), std::move(fault));
}

absl::Status FaultyBackend::Attend(const AttentionArgs& args, Stream stream) {
  if (attends_to_fault_ > 0 && --attends_to_fault_ == 0) {
    if (absl::Status status = fault_(); !status.ok()) return status;
  }
  return backend_->Attend(args, stream);
}

}  // namespace prefilld
