#include "client/cli/policy.h"

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cli/report.h"

namespace prefilld::cli {
namespace {

std::string NameOf(v1::Method method) { return ShortName(v1::Method_Name(method), "METHOD_"); }

std::vector<std::string> MethodNames() {
  std::vector<std::string> names;
  for (int i = 0; i < v1::Method_descriptor()->value_count(); ++i) {
    const auto method = static_cast<v1::Method>(v1::Method_descriptor()->value(i)->number());
    if (method != v1::METHOD_UNSPECIFIED) names.push_back(NameOf(method));
  }
  return names;
}

}  // namespace

void AddRequestId(CLI::App& command, std::string& request_id) {
  command.add_option("--request_id", request_id,
                     "Name of the request, at most 64 letters, digits, '.', '_' and '-' [random]");
}

void AddPolicyFlags(CLI::App& command, PolicyFlags& flags) {
  constexpr char kGroup[] = "Policy";
  const auto add = [&](const char* name, auto& value, const char* help) {
    command.add_option(name, value, help)->group(kGroup);
  };
  add("--method", flags.method,
      "How blocks of keys are chosen: dense, flexprefill or joint [joint, and dense where the "
      "server finds that faster]");
  add("--gamma", flags.gamma,
      "Coverage, the share of attention to keep, above 0 and below 1 [0.9]");
  add("--tau", flags.tau, "flexprefill's pattern threshold, 0 to 1 [0.1]");
  add("--min_budget", flags.min_budget,
      "Least keys read per row, tokens [1024 for flexprefill, else 0]");
  add("--max_budget", flags.max_budget, "Most keys read per row, tokens [no limit]");
  add("--block_size", flags.block_size, "Tokens of a block, 64 or 128 [128]");
  add("--min_captured_mass", flags.min_captured_mass,
      "A head that captures a smaller share runs dense, 0 to 1 [0]");
}

absl::StatusOr<v1::SparsityPolicy> ToPolicy(const PolicyFlags& flags) {
  v1::SparsityPolicy policy;
  if (!flags.method.empty()) {
    v1::Method method;
    const std::string enum_name = absl::StrCat("METHOD_", absl::AsciiStrToUpper(flags.method));
    if (!v1::Method_Parse(enum_name, &method) || NameOf(method) != flags.method ||
        method == v1::METHOD_UNSPECIFIED) {
      return absl::InvalidArgumentError(absl::StrCat("unknown method ", flags.method, " (",
                                                     absl::StrJoin(MethodNames(), ", "), ")"));
    }
    policy.set_method(method);
  }
  if (flags.gamma) policy.set_gamma(*flags.gamma);
  if (flags.tau) policy.set_tau(*flags.tau);
  if (flags.min_budget) policy.set_min_budget_tokens(*flags.min_budget);
  if (flags.max_budget) policy.set_max_budget_tokens(*flags.max_budget);
  if (flags.block_size) policy.set_block_size(*flags.block_size);
  if (flags.min_captured_mass) policy.set_min_captured_mass(*flags.min_captured_mass);
  return policy;
}

}  // namespace prefilld::cli
