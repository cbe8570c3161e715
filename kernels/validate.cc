#include "kernels/validate.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace prefilld {
namespace {

constexpr int kBlockSizes[] = {64, 128};
constexpr int kPageTokensMin = 16, kPageTokensMax = 4096;

absl::Status ValidateHeads(const AttentionShape& shape) {
  if (shape.q_heads <= 0 || shape.kv_heads <= 0 || shape.q_heads % shape.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(shape.q_heads, " query heads over ",
                                                   shape.kv_heads,
                                                   " kv heads: a positive multiple is needed"));
  }
  if (shape.head_dim <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim ", shape.head_dim, " is not positive"));
  }
  return absl::OkStatus();
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
  if (std::find(std::begin(kBlockSizes), std::end(kBlockSizes), policy.block_size) ==
      std::end(kBlockSizes)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "block_size ", policy.block_size, " is not one of ", absl::StrJoin(kBlockSizes, ", ")));
  }
  if (!(policy.gamma > 0 && policy.gamma < 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "gamma ", policy.gamma, " is not between 0 and 1 (to keep everything, use method dense)"));
  }
  return absl::OkStatus();
}

template <typename T>
bool Has(std::span<const T> table, T value) {
  return std::find(table.begin(), table.end(), value) != table.end();
}

constexpr auto kName = [](std::string* out, auto value) { out->append(Name(value)); };

absl::Status ValidateMethod(const AttentionShape& shape, Method method, const KernelTable& table) {
  const std::string backend(table.backend);
  if (!Has(table.methods, method)) {
    return absl::UnimplementedError(absl::StrCat("method ", Name(method), " not supported by ",
                                                 backend, " (",
                                                 absl::StrJoin(table.methods, ", ", kName), ")"));
  }
  if (RowOf(method).needs_equal_lengths && shape.cu_seqlens_q != shape.cu_seqlens_k) {
    std::vector<Method> others(table.methods.begin(), table.methods.end());
    std::erase_if(others, [](Method other) { return RowOf(other).needs_equal_lengths; });
    return absl::UnimplementedError(absl::StrCat("method ", Name(method), " not supported by ",
                                                 backend, " for fewer queries than keys (",
                                                 absl::StrJoin(others, ", ", kName), ")"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateAttention(const AttentionShape& shape, const SparsityPolicy& policy,
                               const KernelTable& table) {
  absl::Status status = ValidateHeads(shape);
  if (status.ok()) status = ValidateLengths(shape);
  if (status.ok()) status = ValidatePolicy(policy);
  if (!status.ok()) return status;

  const std::string backend(table.backend);
  if (!Has(table.dtypes, shape.dtype)) {
    return absl::UnimplementedError(absl::StrCat("dtype ", Name(shape.dtype), " not supported by ",
                                                 backend, " (",
                                                 absl::StrJoin(table.dtypes, ", ", kName), ")"));
  }
  if (!Has(table.head_dims, shape.head_dim)) {
    return absl::UnimplementedError(absl::StrCat("head_dim ", shape.head_dim, " not supported by ",
                                                 backend, " (",
                                                 absl::StrJoin(table.head_dims, ", "), ")"));
  }
  const int64_t tokens_max = kKeyBlocksMax * policy.block_size;
  for (int s = 0; s < shape.sequences(); ++s) {
    const int64_t tokens = shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s];
    if (tokens > tokens_max) {
      return absl::UnimplementedError(absl::StrCat("sequence ", s, " has ", tokens,
                                                   " keys, a block index of ", policy.block_size,
                                                   " tokens a block reaches ", tokens_max));
    }
  }
  return ValidateMethod(shape, policy.method, table);
}

absl::Status ValidateHeadPolicies(const AttentionShape& shape, const HeadPolicies& heads) {
  if (heads.of_head.size() != static_cast<size_t>(shape.q_heads)) {
    return absl::InvalidArgumentError(absl::StrCat("policies of ", heads.of_head.size(),
                                                   " heads for ", shape.q_heads, " query heads"));
  }
  for (const uint16_t place : heads.of_head) {
    if (place < heads.policies.size()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("a head has policy ", place, " of ", heads.policies.size()));
  }
  for (const SparsityPolicy& policy : heads.policies) {
    if (policy.block_size == heads.policies.front().block_size) continue;
    return absl::InvalidArgumentError(absl::StrCat("block_size ", heads.policies.front().block_size,
                                                   " and ", policy.block_size,
                                                   " in one call: its heads share one"));
  }
  return absl::OkStatus();
}

absl::Status ValidatePages(const KvPages& pages) {
  if (pages.arena == nullptr) return absl::OkStatus();
  const int tokens = pages.page_tokens;
  if (tokens < kPageTokensMin || tokens > kPageTokensMax || (tokens & (tokens - 1)) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("page_tokens ", tokens,
                                                   " is not a power of two from ", kPageTokensMin,
                                                   " to ", kPageTokensMax));
  }
  if (pages.pages == nullptr) return absl::InvalidArgumentError("pages is null, its arena is not");
  if (pages.arena_pages <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("arena_pages ", pages.arena_pages, " is not positive"));
  }
  return absl::OkStatus();
}

}  // namespace prefilld
