#include "client/cpp/client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <optional>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cpp/errors.h"
#include "client/cpp/stubs.h"

namespace prefilld::client {
namespace {

grpc::ChannelArguments ChannelOptions(const std::string& server_name) {
  grpc::ChannelArguments arguments;
  if (!server_name.empty()) arguments.SetSslTargetNameOverride(server_name);
  // Retries are ours: gRPC's own would hold sent chunks back for a replay and cannot keep a
  // deadline over several tries.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // A server that just restarted is found within the back-off of RetryPolicy.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  // How long one attempt to connect may take; the next starts no sooner, also where the last was
  // refused at once.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  return arguments;
}

}  // namespace

std::string NewRequestId() {
  std::random_device device;
  const auto word = [&] { return uint64_t{device()} << 32 | device(); };
  const uint64_t high = (word() & ~uint64_t{0xf000}) | 0x4000;                 // version 4
  const uint64_t low = (word() & ~(uint64_t{3} << 62)) | (uint64_t{2} << 62);  // variant 1
  return absl::StrFormat("%08x-%04x-%04x-%04x-%012x", high >> 32, high >> 16 & 0xffff,
                         high & 0xffff, low >> 48, low & 0xffffffffffff);
}

PrefillClient::PrefillClient(const std::string& target, Credentials credentials)
    : target_(target), credentials_(std::move(credentials)) {}

PrefillClient::PrefillClient(std::shared_ptr<grpc::Channel> channel)
    : stamp_(StampOf({})), stubs_(std::make_shared<Stubs>(std::move(channel))) {}

PrefillClient::~PrefillClient() = default;

absl::StatusOr<std::shared_ptr<PrefillClient::Stubs>> PrefillClient::Connected() {
  std::lock_guard lock(mutex_);
  std::string stamp = StampOf(credentials_);
  if (stubs_ != nullptr && stamp == stamp_) return stubs_;
  if (absl::Status status = CheckCredentials(credentials_, target_); !status.ok()) return status;
  auto channel = ChannelCredentialsOf(credentials_);
  if (!channel.ok()) return channel.status();
  stamp_ = std::move(stamp);
  stubs_ = std::make_shared<Stubs>(
      grpc::CreateCustomChannel(target_, *channel, ChannelOptions(credentials_.server_name)));
  return stubs_;
}

absl::Status PrefillClient::Run(const CallOptions& options,
                                absl::FunctionRef<absl::Status(Try&, Stubs&)> attempt) {
  bool asked = false;
  return RunWithRetries(options, [&](Try& current) -> absl::Status {
    const auto stubs = Connected();
    if (!stubs.ok()) return stubs.status();
    if (!credentials_.token_file.empty()) {
      const auto token = TokenOf(credentials_);
      if (!token.ok()) return token.status();
      current.context.AddMetadata("authorization", absl::StrCat("Bearer ", *token));
    }
    const absl::Status status = attempt(current, **stubs);
    if (!absl::IsUnavailable(status) || target_.empty() || std::exchange(asked, true)) {
      return status;
    }
    const absl::Status why = WhyNoHandshake(credentials_, target_);
    return why.ok() ? status : why;
  });
}

template <typename Response, typename Stub, typename Method, typename Request>
absl::StatusOr<Response> PrefillClient::Unary(Stub Stubs::*stub, Method method,
                                              const Request& request, const CallOptions& options) {
  Response response;
  const absl::Status status = Run(options, [&](Try& current, Stubs& stubs) {
    response.Clear();
    return FromGrpc((stubs.*stub.*method)(&current.context, request, &response));
  });
  if (!status.ok()) return status;
  return response;
}

absl::StatusOr<v1::Summary> PrefillClient::Prefill(
    v1::PrefillRequest request, absl::FunctionRef<absl::Status(const v1::PrefillEvent&)> on_event,
    const CallOptions& options) {
  if (request.request_id().empty()) request.set_request_id(NewRequestId());
  std::optional<v1::Summary> summary;
  std::optional<v1::Lease> lease;
  const absl::Status status = Run(options, [&](Try& current, Stubs& stubs) -> absl::Status {
    auto stream = stubs.prefill.Prefill(&current.context, request);
    absl::Status ours;
    v1::PrefillEvent event;
    while (ours.ok() && stream->Read(&event)) {
      if (event.has_admission()) {
        const v1::Lease& admitted = event.admission().lease();
        if (lease.has_value() &&
            (lease->name() != admitted.name() || lease->generation() != admitted.generation())) {
          ours = absl::AbortedError(
              absl::StrCat("request ", request.request_id(), " was lost; the server began anew"));
          break;
        }
        lease = admitted;
      }
      if (event.has_summary()) summary = event.summary();
      ours = on_event(event);
    }
    if (!ours.ok()) current.context.TryCancel();
    const absl::Status theirs = FromGrpc(stream->Finish());
    return ours.ok() ? theirs : ours;
  });
  if (!status.ok()) return status;
  if (!summary.has_value() && !request.validate_only()) {
    return absl::DataLossError("the server ended the prefill without a summary");
  }
  return std::move(summary).value_or(v1::Summary());
}

absl::StatusOr<v1::Lease> PrefillClient::RenewLease(const v1::RenewLeaseRequest& request,
                                                    const CallOptions& options) {
  return Unary<v1::Lease>(&Stubs::handoff, &v1::KvHandoffService::Stub::RenewLease, request,
                          options);
}

absl::StatusOr<uint32_t> PrefillClient::ReleaseLease(const v1::Lease& lease,
                                                     v1::ReleaseReason reason,
                                                     const CallOptions& options) {
  v1::ReleaseLeaseRequest request;
  request.set_lease(lease.name());
  request.set_generation(lease.generation());
  request.set_reason(reason);
  const auto response = Unary<v1::ReleaseLeaseResponse>(
      &Stubs::handoff, &v1::KvHandoffService::Stub::ReleaseLease, request, options);
  if (!response.ok()) return response.status();
  return response->running_transfers();
}

absl::StatusOr<v1::NegotiateResponse> PrefillClient::Negotiate(const v1::NegotiateRequest& request,
                                                               const CallOptions& options) {
  return Unary<v1::NegotiateResponse>(&Stubs::handoff, &v1::KvHandoffService::Stub::Negotiate,
                                      request, options);
}

absl::StatusOr<std::vector<v1::Model>> PrefillClient::ListModels(const CallOptions& options) {
  const auto response = Unary<v1::ListModelsResponse>(
      &Stubs::models, &v1::ModelService::Stub::ListModels, v1::ListModelsRequest(), options);
  if (!response.ok()) return response.status();
  return std::vector<v1::Model>(response->models().begin(), response->models().end());
}

absl::StatusOr<v1::Model> PrefillClient::GetModel(const std::string& name,
                                                  const CallOptions& options) {
  v1::GetModelRequest request;
  request.set_name(name);
  return Unary<v1::Model>(&Stubs::models, &v1::ModelService::Stub::GetModel, request, options);
}

absl::StatusOr<v1::SparsityReport> PrefillClient::GetSparsityReport(const std::string& request_id,
                                                                    const CallOptions& options) {
  v1::GetSparsityReportRequest request;
  request.set_request_id(request_id);
  return Unary<v1::SparsityReport>(&Stubs::prefill, &v1::PrefillService::Stub::GetSparsityReport,
                                   request, options);
}

absl::StatusOr<bool> PrefillClient::Health(const std::string& service, const CallOptions& options) {
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  const auto response = Unary<grpc::health::v1::HealthCheckResponse>(
      &Stubs::health, &grpc::health::v1::Health::Stub::Check, request, options);
  if (!response.ok()) return response.status();
  return response->status() == grpc::health::v1::HealthCheckResponse::SERVING;
}

}  // namespace prefilld::client
