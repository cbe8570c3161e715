#include "kernels/cuda/model/linear.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::cuda {
namespace {

// Twice what Hopper's kernels ask for at most.
constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr size_t kPlansMax = 512;  // some hundred bytes each
constexpr int kRounds = 3;         // of each candidate, after one that warms it

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
    const cudaDataType_t in = TypeOf(key.shape.dtype), out = TypeOf(key.shape.y_dtype);
    cublasStatus_t status = lt.MatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const auto set = [&](cublasLtMatmulDescAttributes_t what, const auto& value) {
      if (status == CUBLAS_STATUS_SUCCESS) {
        status = lt.MatmulDescSetAttribute(product, what, &value, sizeof value);
      }
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (key.shape.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, in);
    }
    const auto layout = [&](cublasLtMatrixLayout_t* made, cudaDataType_t type, int64_t rows,
                            int64_t columns, int64_t stride) {
      if (status != CUBLAS_STATUS_SUCCESS) return;
      status = lt.MatrixLayoutCreate(made, type, static_cast<uint64_t>(rows),
                                     static_cast<uint64_t>(columns), stride);
    };
    const ProductShape& shape = key.shape;
    layout(&weight, in, shape.in, shape.out, shape.in);
    layout(&x, in, shape.in, shape.tokens, key.x_stride);
    layout(&y, out, shape.out, shape.tokens, key.y_stride);
    return status;
  }

  // What the heuristic thinks of, the best first; at most `most`.
  cublasStatus_t Candidates(cublasLtHandle_t handle, int most,
                            std::vector<cublasLtMatmulHeuristicResult_t>* found) {
    cublasLtMatmulPreference_t preference = nullptr;
    cublasStatus_t status = lt.MatmulPreferenceCreate(&preference);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    status = lt.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &kWorkspaceBytes, sizeof kWorkspaceBytes);
    found->resize(static_cast<size_t>(most));
    int count = 0;
    if (status == CUBLAS_STATUS_SUCCESS) {
      status = lt.MatmulAlgoGetHeuristic(handle, product, weight, x, y, y, preference, most,
                                         found->data(), &count);
    }
    found->resize(static_cast<size_t>(count));
    lt.MatmulPreferenceDestroy(preference);
    return status != CUBLAS_STATUS_SUCCESS || count > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED;
  }

  // Whether it can run this product too, with the workspace that there is.
  bool Takes(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& other) const {
    cublasLtMatmulHeuristicResult_t result;
    return lt.MatmulAlgoCheck(handle, product, weight, x, y, y, &other, &result) ==
               CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kWorkspaceBytes;
  }

  const Key key;
  const CublasLt& lt;
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
};

Multiplier::Multiplier(CudaDevice& device, const CublasLt& lt, Algorithms algorithms,
                       int candidates)
    : device_(device), lt_(lt), algorithms_(std::move(algorithms)), candidates_(candidates) {}

Multiplier::~Multiplier() {
  plans_.clear();
  if (handle_ != nullptr) lt_.Destroy(handle_);
}

absl::StatusOr<std::unique_ptr<Multiplier>> Multiplier::Create(CudaDevice& device,
                                                               const std::string& cache_dir,
                                                               int candidates) {
  auto lt = CublasLt::Open();
  if (!lt.ok()) return lt.status();
  std::unique_ptr<Multiplier> multiplier(new Multiplier(
      device, **lt, Algorithms(cache_dir, device.name(), (*lt)->GetVersion()), candidates));
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

absl::StatusOr<Multiplier::Plan*> Multiplier::PlanOf(const Key& key, const CudaLinear& linear,
                                                     cudaStream_t stream) {
  const auto found =
      std::find_if(plans_.begin(), plans_.end(), [&](const Plan& plan) { return plan.key == key; });
  if (found != plans_.end()) {
    plans_.splice(plans_.begin(), plans_, found);
    return &plans_.front();
  }
  if (plans_.size() == kPlansMax) plans_.pop_back();
  Plan& plan = plans_.emplace_front(key, lt_);
  absl::Status status = Check(plan.Describe(), "describe");
  if (status.ok()) status = Choose(plan, linear, stream);
  if (status.ok()) return &plan;
  plans_.pop_front();
  return status;
}

// That of the next step of tokens; the heuristic's where that one does not take the plan's.
absl::Status Multiplier::Choose(Plan& plan, const CudaLinear& linear, cudaStream_t stream) {
  ProductShape shape = plan.key.shape;
  shape.tokens = TokensStep(shape.tokens);
  const cublasLtMatmulAlgo_t* chosen = algorithms_.Find(shape);
  if (chosen == nullptr) {
    absl::Status status = Measure(shape, linear, stream);
    if (!status.ok() && !absl::IsResourceExhausted(status)) return status;
    chosen = algorithms_.Find(shape);
  }
  if (chosen != nullptr && plan.Takes(handle_, *chosen)) {
    plan.algorithm = *chosen;
    return absl::OkStatus();
  }
  std::vector<cublasLtMatmulHeuristicResult_t> candidates;
  absl::Status status = Check(plan.Candidates(handle_, 1, &candidates), "choose");
  if (status.ok()) plan.algorithm = candidates[0].algo;
  return status;
}

// On memory of its own: a product that adds to its rows must not do so again and again.
absl::Status Multiplier::Measure(const ProductShape& shape, const CudaLinear& linear,
                                 cudaStream_t stream) {
  Plan plan({.shape = shape, .x_stride = shape.in, .y_stride = shape.out}, lt_);
  absl::Status status = Check(plan.Describe(), "describe");
  std::vector<cublasLtMatmulHeuristicResult_t> candidates;
  if (status.ok()) status = Check(plan.Candidates(handle_, candidates_, &candidates), "choose");
  if (!status.ok()) return status;
  auto x = device_.Allocate(static_cast<size_t>(shape.tokens * shape.in) * SizeOf(shape.dtype));
  if (!x.ok()) return x.status();
  auto y = device_.Allocate(static_cast<size_t>(shape.tokens * shape.out) * SizeOf(shape.y_dtype));
  if (!y.ok()) return y.status();
  status = device_.Check(cudaStreamSynchronize(stream), "measure");  // it is alone on the device
  if (!status.ok()) return status;
  auto fastest = Fastest(plan, candidates, {.linear = &linear, .x = x->data(), .y = y->data()});
  if (!fastest.ok()) return fastest.status();
  algorithms_.Keep(shape, candidates[*fastest].algo);
  return absl::OkStatus();
}

// In turns, so that a change of clocks meets all alike; by the least time of each.
absl::StatusOr<size_t> Multiplier::Fastest(
    Plan& plan, const std::vector<cublasLtMatmulHeuristicResult_t>& candidates,
    const Operands& operands) {
  const Stream on{};
  auto begin = device_.NewMark(), end = device_.NewMark();
  if (!begin.ok() || !end.ok()) return begin.ok() ? end.status() : begin.status();
  std::vector<double> seconds(candidates.size(), std::numeric_limits<double>::infinity());
  for (int round = 0; round <= kRounds; ++round) {
    for (size_t i = 0; i < candidates.size(); ++i) {
      absl::Status status = (*begin)->Record(on);
      if (status.ok()) {
        status = Multiply(plan, candidates[i].algo, operands, device_.stream(on));
      }
      if (status.ok()) status = (*end)->Record(on);
      if (status.ok()) status = (*end)->Await();
      if (!status.ok()) return status;
      if (round > 0) seconds[i] = std::min(seconds[i], (*end)->SecondsSince(**begin));
    }
  }
  return std::min_element(seconds.begin(), seconds.end()) - seconds.begin();
}

absl::Status Multiplier::Multiply(Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                                  const Operands& operands, cudaStream_t stream) {
  if (plan.key.shape.bias) {
    const void* bias = operands.linear->bias.data();
    absl::Status status =
        Check(lt_.MatmulDescSetAttribute(plan.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                         sizeof bias),
              "bias");
    if (!status.ok()) return status;
  }
  const float alpha = 1, beta = plan.key.shape.accumulate ? 1 : 0;
  return Check(lt_.Matmul(handle_, plan.product, &alpha, operands.linear->weight->data(),
                          plan.weight, operands.x, plan.x, &beta, operands.y, plan.y, operands.y,
                          plan.y, &algorithm, workspace_.data(), workspace_.bytes(), stream),
               "product");
}

absl::Status Multiplier::Run(const RunArgs& args, cudaStream_t stream) {
  const CudaLinear& linear = *args.linear;
  auto plan = PlanOf({.shape = {.dtype = linear.dtype,
                                .y_dtype = args.y.dtype,
                                .out = linear.out_features,
                                .in = linear.in_features,
                                .tokens = args.tokens,
                                .accumulate = args.accumulate,
                                .bias = linear.bias.data() != nullptr},
                      .x_stride = args.x.stride,
                      .y_stride = args.y.stride},
                     linear, stream);
  if (!plan.ok()) return plan.status();
  return Multiply(**plan, (*plan)->algorithm,
                  {.linear = &linear, .x = args.x.data, .y = args.y.data}, stream);
}

}  // namespace prefilld::cuda
