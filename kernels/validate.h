// What a backend is asked to run, checked at admission: first what none can run, then the table of
// what one has kernels for. The same words from every backend.
#pragma once

#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "kernels/attention.h"

namespace prefilld {

// The closed tables of one backend.
struct KernelTable {
  std::string_view backend;  // as in an error: "cpu"
  std::span<const DType> dtypes;
  std::span<const int> head_dims;
  std::span<const Method> methods;
};

// INVALID_ARGUMENT for what no backend can run. UNIMPLEMENTED, naming what was asked and what there
// is, for what this one has no kernel for.
absl::Status ValidateAttention(const AttentionShape& shape, const SparsityPolicy& policy,
                               const KernelTable& table);

// INVALID_ARGUMENT where a head has no policy, or policies differ in block_size. The policies
// themselves: one by one, as above.
absl::Status ValidateHeadPolicies(const AttentionShape& shape, const HeadPolicies& heads);

// INVALID_ARGUMENT for pages that no backend can run; where there is no arena all is well. Page
// numbers are not looked at: they may lie on a device.
absl::Status ValidatePages(const KvPages& pages);

}  // namespace prefilld
