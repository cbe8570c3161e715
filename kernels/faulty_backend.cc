#include "kernels/faulty_backend.h"

namespace prefilld {

absl::Status FaultyBackend::Attend(const AttentionArgs& args, Stream stream) {
  if (attends_to_fault_ > 0 && --attends_to_fault_ == 0) {
    if (absl::Status status = fault_(); !status.ok()) return status;
  }
  return backend_->Attend(args, stream);
}

}  // namespace prefilld
