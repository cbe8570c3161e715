// A server's refusal as an absl::Status: the code and message, and google.rpc's details as payloads
// (type URL -> serialised message), so that nothing the server said is lost. Pure functions.
#pragma once

#include <grpcpp/support/status.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace prefilld::client {

absl::Status FromGrpc(const grpc::Status& status);

// RetryInfo: how long the server asks to wait before the next try. Nothing: do not retry, except
// where the code itself says so (UNAVAILABLE).
std::optional<absl::Duration> RetryDelay(const absl::Status& status);

// ErrorInfo: why, in a word such as QUEUE_FULL; empty where the server gave none.
std::string ErrorReason(const absl::Status& status);

// The details one per line, for people: "sparsity.gamma: 2 is not below 1", "retry in 500ms".
std::vector<std::string> DetailLines(const absl::Status& status);

}  // namespace prefilld::client
