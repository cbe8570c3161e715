// The one place where an absl::Status becomes a grpc::Status, with the google.rpc details that a
// caller can act on. Functions only; any thread.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace prefilld {

// Details by the facts of the status (server/record/errors.h): BadRequest for every
// INVALID_ARGUMENT, ResourceInfo, RetryInfo where a retry can help, else ErrorInfo with the reason.
grpc::Status ToGrpcStatus(const absl::Status& status);

// "INVALID_ARGUMENT"
const char* CodeName(grpc::StatusCode code);

}  // namespace prefilld
