// What stands in for dense.cc in a build without cuDNN's headers.
#include "kernels/cuda/attend/dense.h"

namespace prefilld::cuda {

struct Dense::State {};

Dense::Dense(CudaDevice&, int) {}
Dense::~Dense() = default;

bool Dense::Plan(const Problem&) { return false; }
absl::Status Dense::Attend(const Problem&, cudaStream_t) {
  return absl::InternalError("this build has no cuDNN");
}

}  // namespace prefilld::cuda
