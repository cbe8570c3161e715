// Of a build without CUDA.
#include "tests/bench/model/product_floor.h"
#include "tests/bench/model/structured_backend.h"

namespace prefilld::bench {

absl::StatusOr<std::unique_ptr<ProductFloor>> ProductFloor::Create(Backend&, const ModelInfo&) {
  return absl::UnimplementedError("this build has no CUDA");
}

absl::StatusOr<std::unique_ptr<StructuredBackend>> StructuredBackend::Create(Backend&, double) {
  return absl::UnimplementedError("this build has no CUDA");
}

}  // namespace prefilld::bench
