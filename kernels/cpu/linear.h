// One linear layer as oneDNN's matmul. Weights are multiplied where they lie, [out, in] row-major,
// without a second packed copy: measured on AVX-512 that costs 3 to 6% against packed weights, 12%
// for prompts of 128 tokens, and saves the size of the model.
#pragma once

#include <dnnl.hpp>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace prefilld::cpu {

// True where this CPU multiplies bf16 natively (AVX512_BF16, AMX).
bool CpuMultipliesBF16();

class CpuLinear : public Linear {
 public:
  // Keeps pointing at `weight` when its dtype is `compute_dtype`, else widens it (F32 only). The
  // bias is always copied to F32.
  CpuLinear(const dnnl::engine& engine, const void* weight, const void* bias, DType dtype,
            DType compute_dtype, int64_t out_features, int64_t in_features);

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }
  DType compute_dtype() const { return compute_dtype_; }

  // y[tokens, out] (+)= x[tokens, in] W^T + bias. x is of compute_dtype, y is F32, strides count
  // elements.
  struct Args {
    const void* x = nullptr;
    int64_t x_stride = 0;
    float* y = nullptr;
    int64_t y_stride = 0;
    int64_t tokens = 0;
    bool accumulate = false;
  };
  absl::Status Run(const Args& args, dnnl::stream& stream) const;

 private:
  const dnnl::engine engine_;
  const int64_t out_, in_;
  const DType compute_dtype_;
  std::vector<float> widened_, bias_;
  const void* weight_;  // [out, in] of compute_dtype_
};

}  // namespace prefilld::cpu
