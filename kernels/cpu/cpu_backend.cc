#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cpu/ops.h"

namespace prefilld::cpu {
namespace {

// The closed tables of what has a kernel here.
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr int kHeadDims[] = {64, 96, 128, 256};
constexpr int kBlockSizes[] = {64, 128};

template <typename T, size_t N>
bool Has(const T (&table)[N], T value) {
  return std::find(std::begin(table), std::end(table), value) != std::end(table);
}

absl::Status ValidateLengths(const AttentionShape& shape) {
  const std::vector<int64_t>& q = shape.cu_seqlens_q;
  const std::vector<int64_t>& k = shape.cu_seqlens_k;
  if (q.size() < 2 || q.size() != k.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("cu_seqlens_q and cu_seqlens_k have ", q.size(), " and ", k.size(),
                     " entries; both need one more than there are sequences"));
  }
  if (q[0] != 0 || k[0] != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("cu_seqlens start at ", q[0], " and ", k[0], ", not at 0"));
  }
  for (size_t s = 0; s + 1 < q.size(); ++s) {
    // Neither difference overflows: every earlier entry is >= 0.
    const bool ascending = q[s + 1] > q[s] && k[s + 1] > k[s];
    if (!ascending || q[s + 1] - q[s] > k[s + 1] - k[s]) {
      return absl::InvalidArgumentError(absl::StrCat("sequence ", s, " spans queries [", q[s], ", ",
                                                     q[s + 1], ") and keys [", k[s], ", ", k[s + 1],
                                                     "); 1 <= queries <= keys is needed"));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidatePolicy(const SparsityPolicy& policy) {
  if (!Has(kBlockSizes, policy.block_size)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "block_size ", policy.block_size, " is not one of ", absl::StrJoin(kBlockSizes, ", ")));
  }
  if (!(policy.gamma > 0 && policy.gamma < 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gamma ", policy.gamma, " is not between 0 and 1 (to keep everything, use method dense)"));
  }
  return absl::OkStatus();
}

}  // namespace

CpuBackend::CpuBackend(int threads)
    : ops_(CreateOps(threads)), selection_(threads), attention_(threads) {}

absl::Status CpuBackend::Supports(const AttentionShape& shape, const SparsityPolicy& policy) const {
  if (shape.q_heads <= 0 || shape.kv_heads <= 0 || shape.q_heads % shape.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(shape.q_heads, " query heads over ",
                                                   shape.kv_heads,
                                                   " kv heads: a positive multiple is needed"));
  }
  if (shape.head_dim <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim ", shape.head_dim, " is not positive"));
  }
  absl::Status status = ValidateLengths(shape);
  if (status.ok()) status = ValidatePolicy(policy);
  if (!status.ok()) return status;

  if (!Has(kDTypes, shape.dtype)) {
    return absl::UnimplementedError("dtype not supported by cpu (F32, BF16, F16)");
  }
  if (!Has(kHeadDims, shape.head_dim)) {
    return absl::UnimplementedError(absl::StrCat("head_dim ", shape.head_dim,
                                                 " not supported by cpu (",
                                                 absl::StrJoin(kHeadDims, ", "), ")"));
  }
  if (policy.method == Method::kFlexPrefill && shape.cu_seqlens_q != shape.cu_seqlens_k) {
    return absl::UnimplementedError(
        "method flexprefill not supported by cpu for fewer queries than keys (dense, joint)");
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::EstimatePattern(const AttentionArgs& args, Stream) {
  return selection_.Estimate(args);
}
absl::Status CpuBackend::SelectBlocks(const AttentionArgs& args, Stream) {
  return selection_.Select(args);
}
absl::Status CpuBackend::MeasureCapturedMass(const AttentionArgs& args, Stream) {
  return selection_.MeasureCapturedMass(args);
}
absl::Status CpuBackend::Attend(const AttentionArgs& args, Stream) { return attention_.Run(args); }

}  // namespace prefilld::cpu
