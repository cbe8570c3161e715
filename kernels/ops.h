// What a transformer needs besides attention. Activations are F32 row-major [tokens, width]; weights
// keep the checkpoint's dtype where the device computes in it, else they are widened when prepared.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace prefilld {

struct Stream {
  void* handle = nullptr;  // null: the device's only stream
};

// A prepared weight [out_features, in_features] with its bias; made by Ops::PrepareLinear. It may
// point into the memory it was prepared from, which must outlive it.
class Linear {
 public:
  virtual ~Linear() = default;
  virtual int64_t in_features() const = 0;
  virtual int64_t out_features() const = 0;
};

struct RopeArgs {
  float* x = nullptr;               // [tokens, heads, head_dim], rotated in place
  int64_t token_stride = 0;         // elements
  int heads = 0;
  int head_dim = 0;
  const int32_t* positions = nullptr;       // [tokens]
  const float* inverse_frequency = nullptr; // [head_dim / 2], rotate-half pairs (i, i + head_dim / 2)
  int64_t tokens = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // weight: [out, in] row-major of `dtype`; bias: [out] of `dtype` or null.
  virtual absl::StatusOr<std::unique_ptr<Linear>> PrepareLinear(const void* weight, const void* bias,
                                                                DType dtype, int64_t out_features,
                                                                int64_t in_features) = 0;
  // y[tokens, out] = x[tokens, in] W^T + bias; accumulate: y += ...
  struct LinearArgs {
    const Linear* linear = nullptr;
    const float* x = nullptr;
    int64_t x_stride = 0;  // elements between tokens
    float* y = nullptr;
    int64_t y_stride = 0;
    int64_t tokens = 0;
    bool accumulate = false;
  };
  virtual absl::Status Apply(const LinearArgs& args, Stream stream) = 0;

  // out[t] = table[ids[t]], table [vocab, width] of dtype.
  virtual absl::Status Embed(const void* table, DType dtype, int64_t width, const uint32_t* ids,
                             int64_t tokens, float* out, Stream stream) = 0;
  // out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, F32 throughout. out may be x.
  virtual absl::Status RmsNorm(const float* x, const float* weight, float eps, int64_t width,
                               int64_t tokens, float* out, Stream stream) = 0;
  virtual absl::Status Rope(const RopeArgs& args, Stream stream) = 0;
  // out = silu(gate) * up, elementwise over count values. out may be gate.
  virtual absl::Status SwiGlu(const float* gate, const float* up, int64_t count, float* out,
                              Stream stream) = 0;
  // dst[rows, width] contiguous = round-to-nearest-even of src[rows, width] whose rows lie src_stride
  // elements apart. Runs on the calling thread: callers split the work.
  virtual absl::Status Convert(const float* src, int64_t src_stride, int64_t rows, int64_t width,
                               DType dtype, void* dst, Stream stream) = 0;
};

}  // namespace prefilld
