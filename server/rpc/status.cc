#include "server/rpc/status.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "absl/strings/ascii.h"
#include "google/rpc/error_details.pb.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

// Status and details travel in trailers, which peers limit to 8 KiB; messages quote the request.
constexpr size_t kMessageBytesMax = 1024;

// Bytes of the UTF-8 character that `text` begins with; 0 where it begins with none.
size_t CharacterBytes(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  const size_t bytes = first < 0x80                     ? 1
                       : first >= 0xc2 && first <= 0xdf ? 2
                       : first >= 0xe0 && first <= 0xef ? 3
                       : first >= 0xf0 && first <= 0xf4 ? 4
                                                        : 0;
  if (bytes > text.size()) return 0;
  for (size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  const bool overlong = (first == 0xe0 && byte(1) < 0xa0) || (first == 0xf0 && byte(1) < 0x90);
  const bool no_character = (first == 0xed && byte(1) > 0x9f) || (first == 0xf4 && byte(1) > 0x8f);
  return overlong || no_character ? 0 : bytes;
}

// As much of it as is sent. Quotes of a request end anywhere, and a message with half a character
// is one that no client can parse: bytes that are none are sent as '?'.
std::string Sent(absl::string_view text) {
  std::string sent;
  while (!text.empty()) {
    const size_t bytes = CharacterBytes(text);
    if (sent.size() + std::max<size_t>(bytes, 1) > kMessageBytesMax) break;
    bytes == 0 ? sent.append("?") : sent.append(text.data(), bytes);
    text.remove_prefix(std::max<size_t>(bytes, 1));
  }
  return sent;
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());  // the numbers are the same
  const std::string message = Sent(status.message());
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
    resource.set_resource_name(Sent(facts.resource_name));
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
