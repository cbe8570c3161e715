// Products with weights, by cuBLASLt: y = x W^T + bias, F32 sums whatever comes in (F32 rows are
// multiplied as F32, not TF32). The parts of a linear are stacked into one matrix, so that what is
// read together is one product. Called by the engine thread; enqueues on a stream and waits for
// nothing, but where a shape is first seen: then the library's algorithms are measured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/model/algorithms.h"
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
  // Of what cuBLASLt's heuristic offers for a shape, its best first, how many are measured.
  static constexpr int kCandidates = 8;

  // UNAVAILABLE: there is no cuBLASLt here. What is measured is kept in the directory, if one is
  // given.
  static absl::StatusOr<std::unique_ptr<Multiplier>> Create(CudaDevice& device,
                                                            const std::string& cache_dir,
                                                            int candidates = kCandidates);
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
  struct Key {
    ProductShape shape;
    int64_t x_stride, y_stride;
    bool operator==(const Key&) const = default;
  };
  struct Plan;
  struct Operands {
    const CudaLinear* linear;
    const void* x;
    void* y;
  };
  Multiplier(CudaDevice& device, const CublasLt& lt, Algorithms algorithms, int candidates);
  absl::StatusOr<Plan*> PlanOf(const Key& key, const CudaLinear& linear, cudaStream_t stream);
  absl::Status Choose(Plan& plan, const CudaLinear& linear, cudaStream_t stream);
  absl::Status Measure(const ProductShape& shape, const CudaLinear& linear, cudaStream_t stream);
  absl::StatusOr<size_t> Fastest(Plan& plan,
                                 const std::vector<cublasLtMatmulHeuristicResult_t>& candidates,
                                 const Operands& operands);
  absl::Status Multiply(Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Operands& operands,
                        cudaStream_t stream);
  absl::Status Check(cublasStatus_t status, const char* what) const;

  CudaDevice& device_;
  const CublasLt& lt_;
  cublasLtHandle_t handle_ = nullptr;
  Algorithms algorithms_;
  const int candidates_;
  Buffer workspace_;       // of one product; those on a stream follow each other
  std::list<Plan> plans_;  // the last used first
};

}  // namespace prefilld::cuda
