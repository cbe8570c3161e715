// The products of a model's layers by themselves, in their order: what its linear part cannot take
// less than on this device. By the algorithms that the model runs, and by the fastest of all that
// the library offers for a shape. On CUDA alone.
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

  enum Algorithms { kOfTheModel, kFastest };
  // On the device's clock, for so many tokens, all layers.
  virtual absl::StatusOr<double> Seconds(int64_t tokens, Algorithms algorithms) = 0;
};

}  // namespace prefilld::bench
