#include "kernels/cuda/cuda_backend.h"

#include <cstring>
#include <utility>

#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/methods.h"
#include "kernels/cuda/model/ops.h"

namespace prefilld::cuda {
namespace {

// Prompts whose length does not come back would pay for a plan each.
constexpr int kCallsBeforePlan = 8;
// From here on our own kernel for Hopper, over every block, is faster than cuDNN, by 2 to 23%;
// below, its index and queue take as long as the attention.
constexpr int64_t kSm90TokensMin = 2048;

}  // namespace

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(const CudaOptions& options) {
  auto device = CudaDevice::Open(options.memory_bytes);
  if (!device.ok()) return device.status();
  auto set = ChooseKernelSet(options.kernels, (*device)->capability());
  if (!set.ok()) return set.status();
  return std::unique_ptr<CudaBackend>(new CudaBackend(*std::move(device), *set, options.cache_dir));
}

CudaBackend::CudaBackend(std::unique_ptr<CudaDevice> device, KernelSet set, std::string cache_dir)
    : device_(std::move(device)),
      set_(set),
      cache_dir_(std::move(cache_dir)),
      dense_(*device_, kCallsBeforePlan) {}

absl::StatusOr<Ops*> CudaBackend::ops() {
  if (ops_ == nullptr) {
    auto made = CreateOps(*device_, cache_dir_);
    if (!made.ok()) return made.status();
    ops_ = *std::move(made);
  }
  return ops_.get();
}

absl::Status CudaBackend::Supports(const AttentionShape& shape,
                                   const SparsityPolicy& policy) const {
  return CheckSupported(set_, shape, policy);
}

size_t CudaBackend::WorkspaceBytes(const AttentionShape& shape,
                                   const SparsityPolicy& policy) const {
  AttentionArgs args;  // its tensors do not matter
  args.shape = shape;
  args.policy = policy;
  std::vector<Sequence> sequences;
  return LayOut(MakeProblem(args, &sequences), policy.method).bytes;
}

absl::Status CudaBackend::ReserveWorkspace(size_t bytes) {
  if (workspace_.bytes() < bytes) sequences_.clear();  // they lie in it
  return Grow(*device_, bytes, workspace_);
}

absl::Status CudaBackend::ReleaseWorkspace() {
  sequences_.clear();
  return Release(*device_, workspace_);
}

// Everything of a call that may fail for want of memory, and the sequences on the device.
absl::Status CudaBackend::Prepare(const AttentionArgs& args, Stream stream) {
  absl::Status status = CheckTensors(args);
  if (!status.ok()) return status;
  std::vector<Sequence> sequences;
  Problem problem = MakeProblem(args, &sequences);
  layout_ = LayOut(problem, args.policy.method);
  const bool written =
      workspace_.bytes() >= layout_.bytes && sequences.size() == sequences_.size() &&
      std::memcmp(sequences.data(), sequences_.data(), sequences.size() * sizeof(Sequence)) == 0;
  if (!written) sequences_.clear();
  status = Grow(*device_, layout_.bytes, workspace_);
  if (!status.ok()) return status;
  auto* on_device = reinterpret_cast<Sequence*>(workspace_.as<std::byte>() + layout_.sequences);
  if (!written) {
    sequences_ = std::move(sequences);
    status = device_->Check(WriteSequences(sequences_.data(), static_cast<int>(sequences_.size()),
                                           on_device, device_->stream(stream)),
                            "sequences");
    if (!status.ok()) sequences_.clear();
  }
  problem_ = problem;
  problem_.host_sequence = sequences_.data();
  problem_.sequence = on_device;
  return status;
}

Selection CudaBackend::SelectionOf(const AttentionArgs& args) const {
  return {.problem = problem_,
          .gamma = args.policy.gamma,
          .flexprefill = args.policy.flexprefill,
          .min_budget_tokens = args.policy.min_budget_tokens,
          .max_budget_tokens = args.policy.max_budget_tokens,
          .workspace = workspace_.as<std::byte>() + layout_.stage,
          .report = args.report};
}

absl::Status CudaBackend::EstimatePattern(const AttentionArgs& args, Stream stream) {
  absl::Status status = Prepare(args, stream);
  if (!status.ok()) return status;
  if (args.policy.method == Method::kDense) {
    planned_ =
        (!RunsSm90(set_, problem_) || problem_.total_k < kSm90TokensMin) && dense_.Plan(problem_);
  }
  const SelectionLauncher estimate = LaunchersOf(args.policy.method).estimate;
  if (estimate == nullptr) return absl::OkStatus();
  return device_->Check(
      estimate(SelectionOf(args), device_->multiprocessors(), device_->stream(stream)), "estimate");
}

absl::Status CudaBackend::SelectBlocks(const AttentionArgs& args, Stream stream) {
  absl::Status status = Prepare(args, stream);
  if (!status.ok()) return status;
  const SelectionLauncher select = LaunchersOf(args.policy.method).select;
  return device_->Check(
      select(SelectionOf(args), device_->multiprocessors(), device_->stream(stream)), "select");
}

absl::Status CudaBackend::MeasureCapturedMass(const AttentionArgs& args, Stream stream) {
  // Dense attention captures everything, as the report already says.
  if (args.policy.method == Method::kDense) return absl::OkStatus();
  absl::Status status = Prepare(args, stream);
  if (!status.ok()) return status;
  return device_->Check(
      cuda::MeasureCapturedMass(SelectionOf(args), args.policy.min_captured_mass,
                                device_->multiprocessors(), device_->stream(stream)),
      "captured mass");
}

absl::Status CudaBackend::Attend(const AttentionArgs& args, Stream stream) {
  if (args.cancelled != nullptr && *args.cancelled) return absl::OkStatus();
  absl::Status status = Prepare(args, stream);
  if (!status.ok()) return status;
  const cudaStream_t on = device_->stream(stream);
  // Every causal block is what the vendor's kernel computes without reading an index.
  if (args.policy.method == Method::kDense && planned_) {
    return dense_.Attend(problem_, on);
  }
  void* workspace = workspace_.as<std::byte>() + layout_.stage;
  const int multiprocessors = device_->multiprocessors();
  const bool f32 = HasAttendF32(problem_.dtype, problem_.head_dim, problem_.block_size);
  const auto attend = RunsSm90(set_, problem_) ? AttendSm90 : f32 ? AttendF32 : AttendSm80;
  return device_->Check(attend(problem_, workspace, multiprocessors, on), "attend");
}

}  // namespace prefilld::cuda
