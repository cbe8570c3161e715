#include "server/record/errors.h"

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

constexpr char kField[] = "prefilld/field";
constexpr char kReason[] = "prefilld/reason";
constexpr char kRetryAfterMs[] = "prefilld/retry_after_ms";
constexpr char kResourceType[] = "prefilld/resource_type";
constexpr char kResourceName[] = "prefilld/resource_name";

std::string Get(const absl::Status& status, absl::string_view url) {
  auto payload = status.GetPayload(url);
  return payload ? std::string(*payload) : std::string();
}

}  // namespace

absl::Status InvalidField(absl::string_view field, absl::string_view message) {
  absl::Status status = absl::InvalidArgumentError(absl::StrCat(field, ": ", message));
  status.SetPayload(kField, absl::Cord(field));
  return status;
}

absl::Status ResourceNotFound(absl::string_view type, absl::string_view name) {
  absl::Status status = absl::NotFoundError(
      name.empty() ? absl::StrCat("no such ", type) : absl::StrCat("no ", type, " '", name, "'"));
  status.SetPayload(kResourceType, absl::Cord(type));
  status.SetPayload(kResourceName, absl::Cord(name));
  return status;
}

absl::Status RetryLater(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                        absl::Duration retry_after) {
  absl::Status status(code, message);
  status.SetPayload(kReason, absl::Cord(reason));
  status.SetPayload(kRetryAfterMs,
                    absl::Cord(absl::StrCat(absl::ToInt64Milliseconds(retry_after))));
  return status;
}

absl::Status Draining() {
  return RetryLater(absl::StatusCode::kUnavailable, "draining", "the server is shutting down",
                    absl::Seconds(1));
}

absl::Status DeadlineInfeasible(absl::string_view message) {
  absl::Status status = absl::ResourceExhaustedError(message);
  status.SetPayload(kReason, absl::Cord(kDeadlineInfeasible));
  return status;
}

ErrorFacts FactsOf(const absl::Status& status) {
  ErrorFacts facts;
  facts.field = Get(status, kField);
  facts.reason = Get(status, kReason);
  facts.resource_type = Get(status, kResourceType);
  facts.resource_name = Get(status, kResourceName);
  int64_t milliseconds = 0;
  if (absl::SimpleAtoi(Get(status, kRetryAfterMs), &milliseconds)) {
    facts.retry_after = absl::Milliseconds(milliseconds);
  }
  return facts;
}

}  // namespace prefilld
