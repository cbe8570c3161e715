// What every refusal of a request keeps, whatever the request said.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "google/rpc/error_details.pb.h"
#include "server/record/errors.h"
#include "server/rpc/status.h"
#include "tests/fuzz/property.h"

namespace prefilld {

// It is the caller's mistake or what is not served, in words and details that a client can read.
inline void CheckRefusal(const absl::Status& status) {
  const std::string text = status.ToString();
  Promise(absl::IsInvalidArgument(status) || absl::IsUnimplemented(status) ||
              absl::IsFailedPrecondition(status),
          "a refusal says whose fault it is", text);
  Promise(!status.message().empty(), "a refusal has a message", text);
  const grpc::Status sent = ToGrpcStatus(status);
  google::rpc::Status rich;
  Promise(rich.ParseFromString(sent.error_details()), "details are a google.rpc.Status", text);
  for (const auto& detail : rich.details()) {
    google::rpc::BadRequest bad;
    if (!detail.Is<google::rpc::BadRequest>()) continue;
    Promise(detail.UnpackTo(&bad), "BadRequest can be read", text);
    Promise(
        bad.field_violations(0).field() == FactsOf(status).field || FactsOf(status).field.empty(),
        "BadRequest names the field", text);
  }
}

}  // namespace prefilld
