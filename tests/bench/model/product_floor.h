// The products of a model's layers by themselves, in their order: what its linear part cannot take
// less than on this device. On CUDA alone.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "server/model/transformer.h"

namespace prefilld::bench {

class ProductFloor {
 public:
  // Weights and rows of its own, of random numbers: a device is faster on zeroes. UNIMPLEMENTED
  // where there is no such thing. The backend outlives it.
  static absl::StatusOr<std::unique_ptr<ProductFloor>> Create(Backend& backend,
                                                              const ModelInfo& info);
  virtual ~ProductFloor() = default;

  // On the device's clock, for so many tokens, all layers.
  virtual absl::StatusOr<double> Seconds(int64_t tokens) = 0;
};

}  // namespace prefilld::bench
