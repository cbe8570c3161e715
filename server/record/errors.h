// Refusals with the facts a caller can act on. They travel as payloads of absl::Status;
// rpc/status.cc turns them into google.rpc details, the one place where that happens.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prefilld {

// INVALID_ARGUMENT about one field of the request, named by its path ("sparsity.gamma").
absl::Status InvalidField(absl::string_view field, absl::string_view message);
// NOT_FOUND of a "model", "lease" or "request". A lease's name is left out, it may be a secret.
absl::Status ResourceNotFound(absl::string_view type, absl::string_view name);
// RESOURCE_EXHAUSTED or UNAVAILABLE that may succeed later. `reason` is a metric label.
absl::Status RetryLater(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                        absl::Duration retry_after);
// UNAVAILABLE: no new work while the server shuts down.
absl::Status Draining();
// RESOURCE_EXHAUSTED without retry: the deadline cannot be met by the cost model.
inline constexpr char kDeadlineInfeasible[] = "deadline_infeasible";
absl::Status DeadlineInfeasible(absl::string_view message);

// What a status carries of the above.
struct ErrorFacts {
  std::string field;
  std::string resource_type, resource_name;
  std::string reason;  // "queue_full", "backlog", "kv_memory", "draining", ...: a metric's label
  std::optional<absl::Duration> retry_after;
};
ErrorFacts FactsOf(const absl::Status& status);

}  // namespace prefilld
