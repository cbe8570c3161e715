// Any bytes as a SparsityPolicy: what is admitted is within what the methods compute with.
#include <string>

#include "kernels/validate.h"
#include "server/rpc/validate_policy.h"
#include "tests/fuzz/refusal.h"

namespace prefilld {
namespace {

constexpr DType kDtypes[] = {DType::kF32};
constexpr int kHeadDims[] = {64};
constexpr Method kMethods[] = {Method::kDense, Method::kFlexPrefill, Method::kJoint};
constexpr KernelTable kTable = {
    .backend = "any", .dtypes = kDtypes, .head_dims = kHeadDims, .methods = kMethods};

void CheckValid(const v1::SparsityPolicy& asked, const ValidPolicy& valid) {
  const std::string text = asked.ShortDebugString();
  const SparsityPolicy& policy = valid.policy;
  Promise(policy.gamma > 0 && policy.gamma < 1, "0 < gamma < 1", text);
  Promise(policy.flexprefill.tau >= 0 && policy.flexprefill.tau <= 1, "0 <= tau <= 1", text);
  Promise(policy.min_captured_mass >= 0 && policy.min_captured_mass <= 1,
          "0 <= min_captured_mass <= 1", text);
  Promise(policy.block_size == 64 || policy.block_size == 128, "blocks of 64 or 128", text);
  Promise(policy.min_budget_tokens >= 0 && policy.max_budget_tokens >= 1, "budgets of tokens",
          text);
  if (asked.has_min_budget_tokens()) {
    Promise(policy.min_budget_tokens <= policy.max_budget_tokens, "min_budget <= max_budget", text);
  }
  Promise(valid.method_unspecified == (asked.method() == v1::METHOD_UNSPECIFIED),
          "it is known whether a method was named", text);
  const AttentionShape shape = {.dtype = DType::kF32,
                                .q_heads = 2,
                                .kv_heads = 1,
                                .head_dim = 64,
                                .cu_seqlens_q = {0, 300},
                                .cu_seqlens_k = {0, 300}};
  const absl::Status runs = ValidateAttention(shape, policy, kTable);
  Promise(runs.ok(), "what admission takes a backend takes", runs.ToString());
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;  // NOLINT
  v1::SparsityPolicy asked;
  if (!asked.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto valid = ValidatePolicy(asked);
  if (!valid.ok()) {
    CheckRefusal(valid.status());
    return 0;
  }
  CheckValid(asked, *valid);
  v1::SparsityPolicy again;
  Promise(again.ParseFromString(asked.SerializeAsString()), "a policy can be sent on");
  Promise(ValidatePolicy(again)->policy == valid->policy, "and means the same then");
  return 0;
}
