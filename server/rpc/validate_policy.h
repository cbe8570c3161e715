// SparsityPolicy of the proto to that of the kernels; see validate.h.
#pragma once

#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "prefilld/v1/sparsity.pb.h"

namespace prefilld {

struct ValidPolicy {
  SparsityPolicy policy;
  bool method_unspecified = false;
};
// Field names in refusals start with "sparsity.".
absl::StatusOr<ValidPolicy> ValidatePolicy(const v1::SparsityPolicy& proto);

}  // namespace prefilld
