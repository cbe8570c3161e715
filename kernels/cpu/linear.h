// Linear layers as oneDNN's matmul. Weights are multiplied where they lie, [out, in] row-major,
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

// What becomes of BF16 weights. kBestForCpu multiplies bf16 x bf16 into F32 where the CPU can;
// kWiden keeps a copy in F32.
enum class BF16Weights { kBestForCpu, kWiden };

// Parts stay apart: each is a product of its own.
class CpuLinear : public Linear {
 public:
  // Keeps pointing at weights whose dtype is `compute_dtype`, else widens them (F32 only). Biases
  // are always copied to F32.
  CpuLinear(const LinearWeights& weights, DType compute_dtype);

  // The products of all parts but the first.
  size_t WorkspaceBytes(int64_t tokens) const override;

  struct Part {
    int64_t out_features = 0;
    const void* weight = nullptr;  // [out_features, in_features] of compute_dtype
    std::vector<float> widened;    // where `weight` points then
    std::vector<float> bias;       // [out_features] or empty
  };
  const std::vector<Part>& parts() const { return parts_; }
  int64_t in_features() const { return in_; }
  DType compute_dtype() const { return compute_dtype_; }

 private:
  const int64_t in_;
  const DType compute_dtype_;
  std::vector<Part> parts_;
};

// Runs products, each on an OpenMP team of `threads`, on the caller's thread.
class Multiplier {
 public:
  Multiplier(int threads, BF16Weights bf16);

  absl::StatusOr<std::unique_ptr<CpuLinear>> Prepare(const LinearWeights& weights) const;

  // y[tokens, out] (+)= x[tokens, in] W^T + bias of one part. x and y are F32.
  struct Args {
    const CpuLinear* linear = nullptr;
    size_t part = 0;
    Rows x, y;
    int64_t tokens = 0;
    bool accumulate = false;
  };
  absl::Status Run(const Args& args);

 private:
  absl::Status Product(const Args& args);  // x is of the linear's compute_dtype

  const int threads_;
  const bool native_bf16_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<uint16_t> staged_;  // [kStagedTokens, in_features] BF16
};

}  // namespace prefilld::cpu
