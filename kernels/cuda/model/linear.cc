#include "kernels/cuda/model/linear.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::cuda {
namespace {

// Twice what Hopper's kernels ask for at most.
constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr size_t kPlansMax = 512;  // some hundred bytes each

cudaDataType_t TypeOf(DType dtype) {
  return dtype == DType::kF32 ? CUDA_R_32F : dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

// Column-major, as cuBLAS counts: y^T [out, tokens] = W [out, in] x^T [in, tokens].
struct Multiplier::Plan {
  explicit Plan(const Key& key_in, const CublasLt& lt_in) : key(key_in), lt(lt_in) {}
  ~Plan() {
    if (product != nullptr) lt.MatmulDescDestroy(product);
    for (cublasLtMatrixLayout_t layout : {weight, x, y}) {
      if (layout != nullptr) lt.MatrixLayoutDestroy(layout);
    }
  }
  Plan(const Plan&) = delete;

  cublasStatus_t Describe() {
    const cudaDataType_t in = TypeOf(key.dtype), out = TypeOf(key.y_dtype);
    cublasStatus_t status = lt.MatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const auto set = [&](cublasLtMatmulDescAttributes_t what, const auto& value) {
      if (status == CUBLAS_STATUS_SUCCESS) {
        status = lt.MatmulDescSetAttribute(product, what, &value, sizeof value);
      }
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (key.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, in);
    }
    const auto layout = [&](cublasLtMatrixLayout_t* made, cudaDataType_t type, int64_t rows,
                            int64_t columns, int64_t stride) {
      if (status != CUBLAS_STATUS_SUCCESS) return;
      status = lt.MatrixLayoutCreate(made, type, static_cast<uint64_t>(rows),
                                     static_cast<uint64_t>(columns), stride);
    };
    layout(&weight, in, key.in, key.out, key.in);
    layout(&x, in, key.in, key.tokens, key.x_stride);
    layout(&y, out, key.out, key.tokens, key.y_stride);
    return status;
  }

  cublasStatus_t Choose(cublasLtHandle_t handle) {
    cublasLtMatmulPreference_t preference = nullptr;
    cublasStatus_t status = lt.MatmulPreferenceCreate(&preference);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    status = lt.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &kWorkspaceBytes, sizeof kWorkspaceBytes);
    int found = 0;
    if (status == CUBLAS_STATUS_SUCCESS) {
      status = lt.MatmulAlgoGetHeuristic(handle, product, weight, x, y, y, preference, 1, &choice,
                                         &found);
    }
    lt.MatmulPreferenceDestroy(preference);
    return status != CUBLAS_STATUS_SUCCESS || found > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED;
  }

  const Key key;
  const CublasLt& lt;
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulHeuristicResult_t choice{};
};

Multiplier::Multiplier(CudaDevice& device, const CublasLt& lt) : device_(device), lt_(lt) {}

Multiplier::~Multiplier() {
  plans_.clear();
  if (handle_ != nullptr) lt_.Destroy(handle_);
}

absl::StatusOr<std::unique_ptr<Multiplier>> Multiplier::Create(CudaDevice& device) {
  auto lt = CublasLt::Open();
  if (!lt.ok()) return lt.status();
  std::unique_ptr<Multiplier> multiplier(new Multiplier(device, **lt));
  absl::Status status = multiplier->Check((*lt)->Create(&multiplier->handle_), "create");
  if (!status.ok()) return status;
  auto workspace = device.Allocate(kWorkspaceBytes);
  if (!workspace.ok()) return workspace.status();
  multiplier->workspace_ = *std::move(workspace);
  return multiplier;
}

absl::Status Multiplier::Check(cublasStatus_t status, const char* what) const {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  absl::Status device = device_.Check(cudaGetLastError(), what);  // a lost device shows there
  return device.ok() ? absl::InternalError(absl::StrCat("cuBLASLt ", what, ": status ", status))
                     : device;
}

absl::StatusOr<Multiplier::Plan*> Multiplier::PlanOf(const Key& key) {
  const auto found =
      std::find_if(plans_.begin(), plans_.end(), [&](const Plan& plan) { return plan.key == key; });
  if (found != plans_.end()) {
    plans_.splice(plans_.begin(), plans_, found);
    return &plans_.front();
  }
  if (plans_.size() == kPlansMax) plans_.pop_back();
  Plan& plan = plans_.emplace_front(key, lt_);
  absl::Status status = Check(plan.Describe(), "describe");
  if (status.ok()) status = Check(plan.Choose(handle_), "choose");
  if (status.ok()) return &plan;
  plans_.pop_front();
  return status;
}

absl::Status Multiplier::Run(const RunArgs& args, cudaStream_t stream) {
  const CudaLinear& linear = *args.linear;
  auto plan = PlanOf({.dtype = linear.dtype,
                      .y_dtype = args.y.dtype,
                      .out = linear.out_features,
                      .in = linear.in_features,
                      .tokens = args.tokens,
                      .x_stride = args.x.stride,
                      .y_stride = args.y.stride,
                      .accumulate = args.accumulate,
                      .bias = linear.bias.data() != nullptr});
  if (!plan.ok()) return plan.status();
  Plan& p = **plan;
  if (p.key.bias) {
    const void* bias = linear.bias.data();
    absl::Status status =
        Check(lt_.MatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                         sizeof bias),
              "bias");
    if (!status.ok()) return status;
  }
  const float alpha = 1, beta = args.accumulate ? 1 : 0;
  return Check(lt_.Matmul(handle_, p.product, &alpha, linear.weight->data(), p.weight, args.x.data,
                          p.x, &beta, args.y.data, p.y, args.y.data, p.y, &p.choice.algo,
                          workspace_.data(), workspace_.bytes(), stream),
               "product");
}

}  // namespace prefilld::cuda
