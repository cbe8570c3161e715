#include "server/rpc/validate_policy.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

constexpr uint32_t kBudgetTokensMax = 1u << 30;

// What is served, by the name that the wire has for it.
constexpr struct {
  v1::Method on_wire;
  Method method;
} kServed[] = {
    {v1::METHOD_DENSE, Method::kDense},
    {v1::METHOD_FLEXPREFILL, Method::kFlexPrefill},
    {v1::METHOD_JOINT, Method::kJoint},
};

absl::StatusOr<Method> MethodOf(v1::Method method) {
  if (method == v1::METHOD_UNSPECIFIED) return kOpenMethod;
  for (const auto& row : kServed) {
    if (row.on_wire == method) return row.method;
  }
  if (!v1::Method_IsValid(method)) {
    return InvalidField("sparsity.method", absl::StrCat("unknown method ", method));
  }
  const auto name = [](std::string* out, const auto& row) {
    out->append(v1::Method_Name(row.on_wire));
  };
  return absl::UnimplementedError(absl::StrCat("method ", v1::Method_Name(method),
                                               " is not served yet; served are ",
                                               absl::StrJoin(kServed, ", ", name)));
}

absl::Status Unserved(const char* field, const char* why) {
  return absl::UnimplementedError(absl::StrCat("sparsity.", field, " is not served yet: ", why));
}

absl::Status CheckServed(const v1::SparsityPolicy& proto) {
  if (proto.head_overrides_size() > 0) {
    return Unserved("head_overrides", "one policy holds for all heads");
  }
  if (proto.has_alpha()) return Unserved("alpha", "only METHOD_FLASHPREFILL uses it");
  if (proto.mean_correction()) {
    return Unserved("mean_correction", "only METHOD_FLASHPREFILL uses it");
  }
  return absl::OkStatus();
}

// Each of these reads some fields of `proto`, and leaves what has none as it is. Comparisons are
// written so that NaN fails them.
absl::Status ReadThresholds(const v1::SparsityPolicy& proto, SparsityPolicy* policy) {
  if (proto.has_gamma()) policy->gamma = proto.gamma();
  if (!(policy->gamma > 0 && policy->gamma < 1)) {
    return InvalidField("sparsity.gamma",
                        absl::StrCat(proto.gamma(),
                                     " is not above 0 and below 1; to keep every block, "
                                     "use method dense"));
  }
  if (proto.has_tau()) policy->flexprefill.tau = proto.tau();
  if (!(policy->flexprefill.tau >= 0 && policy->flexprefill.tau <= 1)) {
    return InvalidField("sparsity.tau", absl::StrCat(proto.tau(), " is not from 0 to 1"));
  }
  if (proto.has_min_captured_mass()) policy->min_captured_mass = proto.min_captured_mass();
  if (!(policy->min_captured_mass >= 0 && policy->min_captured_mass <= 1)) {
    return InvalidField("sparsity.min_captured_mass",
                        absl::StrCat(proto.min_captured_mass(), " is not from 0 to 1"));
  }
  return absl::OkStatus();
}

absl::Status ReadBlocks(const v1::SparsityPolicy& proto, SparsityPolicy* policy) {
  if (proto.has_block_size()) {
    if (proto.block_size() != 64 && proto.block_size() != 128) {
      return InvalidField("sparsity.block_size",
                          absl::StrCat(proto.block_size(), " is neither 64 nor 128"));
    }
    policy->block_size = static_cast<int>(proto.block_size());
  }
  if (proto.has_max_budget_tokens()) {
    if (proto.max_budget_tokens() < 1 || proto.max_budget_tokens() > kBudgetTokensMax) {
      return InvalidField(
          "sparsity.max_budget_tokens",
          absl::StrCat(proto.max_budget_tokens(), " is not from 1 to ", kBudgetTokensMax));
    }
    policy->max_budget_tokens = proto.max_budget_tokens();
  }
  policy->min_budget_tokens = RowOf(policy->method).min_budget_tokens;
  if (!proto.has_min_budget_tokens()) return absl::OkStatus();
  if (proto.min_budget_tokens() > kBudgetTokensMax) {
    return InvalidField("sparsity.min_budget_tokens",
                        absl::StrCat(proto.min_budget_tokens(), " is over ", kBudgetTokensMax));
  }
  if (proto.min_budget_tokens() > policy->max_budget_tokens) {
    return InvalidField("sparsity.min_budget_tokens",
                        absl::StrCat(proto.min_budget_tokens(), " is over max_budget_tokens ",
                                     policy->max_budget_tokens));
  }
  policy->min_budget_tokens = proto.min_budget_tokens();
  return absl::OkStatus();
}

absl::Status ReadReportLevel(const v1::SparsityPolicy& proto, SparsityPolicy* policy) {
  switch (proto.report_level()) {
    case v1::REPORT_LEVEL_UNSPECIFIED:
      policy->measure_captured_mass = RowOf(policy->method).measures_by_default;
      return absl::OkStatus();
    case v1::REPORT_LEVEL_DENSITY:
      policy->measure_captured_mass = false;
      return absl::OkStatus();
    case v1::REPORT_LEVEL_CAPTURED_MASS:
      policy->measure_captured_mass = true;
      return absl::OkStatus();
    default:
      return InvalidField("sparsity.report_level",
                          absl::StrCat("unknown level ", proto.report_level()));
  }
}

}  // namespace

absl::StatusOr<ValidPolicy> ValidatePolicy(const v1::SparsityPolicy& proto) {
  absl::Status status = CheckServed(proto);
  if (!status.ok()) return status;
  auto method = MethodOf(proto.method());
  if (!method.ok()) return method.status();
  ValidPolicy valid;
  valid.policy.method = *method;
  valid.method_unspecified = proto.method() == v1::METHOD_UNSPECIFIED;
  status = ReadThresholds(proto, &valid.policy);
  if (status.ok()) status = ReadBlocks(proto, &valid.policy);
  if (status.ok()) status = ReadReportLevel(proto, &valid.policy);
  if (!status.ok()) return status;
  return valid;
}

}  // namespace prefilld
