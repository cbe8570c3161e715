// Flags that several commands have: the policy of attend, prefill and bench; the request's name.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "prefilld/v1/sparsity.pb.h"

namespace prefilld::cli {

struct PolicyFlags {
  std::string method;
  std::optional<double> gamma, tau, min_captured_mass;
  std::optional<uint32_t> min_budget, max_budget, block_size;
};

// Both outlive `command`, `flags` and `request_id`.
void AddRequestId(CLI::App& command, std::string& request_id);
void AddPolicyFlags(CLI::App& command, PolicyFlags& flags);

// Only what was given is set; values are the server's to judge. INVALID_ARGUMENT for a method that
// the contract does not name.
absl::StatusOr<v1::SparsityPolicy> ToPolicy(const PolicyFlags& flags);

}  // namespace prefilld::cli
