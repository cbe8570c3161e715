#include "server/rpc/status.h"

#include <string>

#include "absl/strings/ascii.h"
#include "google/rpc/error_details.pb.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

// Status and details travel in trailers, which peers limit to 8 KiB; messages quote the request.
constexpr size_t kMessageBytesMax = 1024;

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());  // the numbers are the same
  const std::string message(status.message().substr(0, kMessageBytesMax));
  const ErrorFacts facts = FactsOf(status);

  google::rpc::Status rich;
  rich.set_code(code);
  rich.set_message(message);
  if (code == grpc::StatusCode::INVALID_ARGUMENT) {
    google::rpc::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field(facts.field.empty() ? "request" : facts.field);
    violation->set_description(message);
    rich.add_details()->PackFrom(bad);
  }
  if (!facts.resource_type.empty()) {
    google::rpc::ResourceInfo resource;
    resource.set_resource_type(facts.resource_type);
    resource.set_resource_name(facts.resource_name.substr(0, kMessageBytesMax));
    resource.set_description(message);
    rich.add_details()->PackFrom(resource);
  }
  if (facts.retry_after) {
    google::rpc::RetryInfo retry;
    const int64_t nanos = absl::ToInt64Nanoseconds(*facts.retry_after);
    retry.mutable_retry_delay()->set_seconds(nanos / 1'000'000'000);
    retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
    rich.add_details()->PackFrom(retry);
  }
  if (!facts.reason.empty()) {
    google::rpc::ErrorInfo error;
    error.set_reason(absl::AsciiStrToUpper(facts.reason));
    error.set_domain("prefilld");
    rich.add_details()->PackFrom(error);
  }
  return grpc::Status(code, message, rich.SerializeAsString());
}

const char* CodeName(grpc::StatusCode code) {
  constexpr const char* kNames[] = {"OK",
                                    "CANCELLED",
                                    "UNKNOWN",
                                    "INVALID_ARGUMENT",
                                    "DEADLINE_EXCEEDED",
                                    "NOT_FOUND",
                                    "ALREADY_EXISTS",
                                    "PERMISSION_DENIED",
                                    "RESOURCE_EXHAUSTED",
                                    "FAILED_PRECONDITION",
                                    "ABORTED",
                                    "OUT_OF_RANGE",
                                    "UNIMPLEMENTED",
                                    "INTERNAL",
                                    "UNAVAILABLE",
                                    "DATA_LOSS",
                                    "UNAUTHENTICATED"};
  const size_t index = static_cast<size_t>(code);
  return index < std::size(kNames) ? kNames[index] : "UNKNOWN";
}

}  // namespace prefilld
