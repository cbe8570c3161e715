// Products with weights, by cuBLASLt: y = x W^T + bias, BF16 or F16 in, F32 sums. The parts of a
// linear are stacked into one matrix, so that what is read together is one product. Called by the
// engine thread; enqueues on a stream and waits for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/model/cublas_lt.h"
#include "kernels/ops.h"

namespace prefilld::cuda {

struct CudaLinear : Linear {
  // The product of all parts: GateRows and SplitQkv read it there. F32 for logits.
  size_t WorkspaceBytes(int64_t tokens) const override {
    return static_cast<size_t>(tokens * out_features) *
           (parts.size() > 1 ? SizeOf(dtype) : sizeof(float));
  }

  DType dtype = DType::kBF16;
  int64_t in_features = 0, out_features = 0;  // of all parts
  std::vector<int64_t> parts;                 // out_features of each
  std::shared_ptr<const Buffer> weight;       // [out_features, in_features]
  Buffer bias;                                // [out_features], or empty
};

class Multiplier {
 public:
  // UNAVAILABLE: there is no cuBLASLt here.
  static absl::StatusOr<std::unique_ptr<Multiplier>> Create(CudaDevice& device);
  ~Multiplier();

  struct RunArgs {
    const CudaLinear* linear = nullptr;
    Rows x;  // [tokens, in_features]
    Rows y;  // [tokens, out_features], the linear's dtype or F32
    int64_t tokens = 0;
    bool accumulate = false;  // y += instead of y =
  };
  absl::Status Run(const RunArgs& args, cudaStream_t stream);

 private:
  // All that an algorithm is chosen by.
  struct Key {
    DType dtype, y_dtype;
    int64_t out, in, tokens, x_stride, y_stride;
    bool accumulate, bias;
    bool operator==(const Key&) const = default;
  };
  struct Plan;
  Multiplier(CudaDevice& device, const CublasLt& lt);
  absl::StatusOr<Plan*> PlanOf(const Key& key);
  absl::Status Check(cublasStatus_t status, const char* what) const;

  CudaDevice& device_;
  const CublasLt& lt_;
  cublasLtHandle_t handle_ = nullptr;
  Buffer workspace_;       // of one product; those on a stream follow each other
  std::list<Plan> plans_;  // the last used first
};

}  // namespace prefilld::cuda
