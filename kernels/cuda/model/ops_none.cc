// What stands in for ops.cc in a build without cuBLASLt's header.
#include "kernels/cuda/model/ops.h"

namespace prefilld::cuda {

absl::StatusOr<std::unique_ptr<Ops>> CreateOps(CudaDevice&, const std::string&) {
  return absl::UnavailableError("this build has no cuBLASLt");
}

}  // namespace prefilld::cuda
