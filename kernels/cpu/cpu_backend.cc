#include "kernels/cpu/cpu_backend.h"

#include "kernels/cpu/gather.h"
#include "kernels/cpu/methods.h"
#include "kernels/cpu/ops.h"
#include "kernels/validate.h"

namespace prefilld::cpu {
namespace {

// The closed tables of what has a kernel here.
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr int kHeadDims[] = {64, 96, 128, 256};

}  // namespace

CpuBackend::CpuBackend(int threads)
    : ops_(CreateOps(threads)), selection_(threads), attention_(threads) {}

absl::Status CpuBackend::Supports(const AttentionShape& shape, const SparsityPolicy& policy) const {
  return ValidateAttention(
      shape, policy,
      {.backend = name(), .dtypes = kDTypes, .head_dims = kHeadDims, .methods = ServedMethods()});
}

absl::Status CpuBackend::SupportsPerHead(const AttentionShape& shape,
                                         const HeadPolicies& heads) const {
  for (const SparsityPolicy& policy : heads.policies) {
    if (absl::Status status = Supports(shape, policy); !status.ok()) return status;
  }
  return ValidateHeadPolicies(shape, heads);
}

template <typename Stage>
absl::Status CpuBackend::Run(const AttentionArgs& args, Stage stage) {
  if (args.kv_pages.arena == nullptr) return stage(args);
  AttentionArgs gathered = args;
  absl::Status status = GatherPages(&gathered, &gathered_);
  return status.ok() ? stage(gathered) : status;
}

absl::Status CpuBackend::EstimatePattern(const AttentionArgs& args, Stream) {
  return Run(args, [&](const AttentionArgs& rows) { return selection_.Estimate(rows); });
}
absl::Status CpuBackend::SelectBlocks(const AttentionArgs& args, Stream) {
  return Run(args, [&](const AttentionArgs& rows) { return selection_.Select(rows); });
}
absl::Status CpuBackend::MeasureCapturedMass(const AttentionArgs& args, Stream) {
  return Run(args, [&](const AttentionArgs& rows) { return selection_.MeasureCapturedMass(rows); });
}
absl::Status CpuBackend::Attend(const AttentionArgs& args, Stream) {
  return Run(args, [&](const AttentionArgs& rows) { return attention_.Run(rows); });
}

}  // namespace prefilld::cpu
