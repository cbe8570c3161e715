#include "client/cpp/errors.h"

#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"

namespace prefilld::client {
namespace {

// The detail of type `Message` in `status`, where there is one that parses.
template <typename Message>
std::optional<Message> Detail(const absl::Status& status) {
  const std::string url = absl::StrCat("type.googleapis.com/", Message::descriptor()->full_name());
  const auto payload = status.GetPayload(url);
  Message message;
  if (!payload.has_value() || !message.ParseFromString(std::string(*payload))) return std::nullopt;
  return message;
}

}  // namespace

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& detail : details.details()) {
      result.SetPayload(detail.type_url(), absl::Cord(detail.value()));
    }
  }
  return result;
}

std::optional<absl::Duration> RetryDelay(const absl::Status& status) {
  const auto info = Detail<google::rpc::RetryInfo>(status);
  if (!info.has_value()) return std::nullopt;
  const auto& delay = info->retry_delay();
  return absl::Seconds(delay.seconds()) + absl::Nanoseconds(delay.nanos());
}

std::string ErrorReason(const absl::Status& status) {
  const auto info = Detail<google::rpc::ErrorInfo>(status);
  return info.has_value() ? info->reason() : "";
}

std::vector<std::string> DetailLines(const absl::Status& status) {
  std::vector<std::string> lines;
  if (const auto bad = Detail<google::rpc::BadRequest>(status)) {
    for (const auto& violation : bad->field_violations()) {
      const bool named = absl::StartsWith(violation.description(), violation.field());
      lines.push_back(named ? violation.description()
                            : absl::StrCat(violation.field(), ": ", violation.description()));
    }
  }
  if (const auto resource = Detail<google::rpc::ResourceInfo>(status)) {
    lines.push_back(absl::StrCat(resource->resource_type(), ": ", resource->resource_name()));
  }
  if (const std::string reason = ErrorReason(status); !reason.empty()) {
    lines.push_back(absl::StrCat("reason: ", reason));
  }
  if (const auto delay = RetryDelay(status)) {
    lines.push_back(absl::StrCat("retry in ", absl::FormatDuration(*delay)));
  }
  return lines;
}

}  // namespace prefilld::client
