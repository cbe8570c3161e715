#include "server/rpc/call.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>

#include <string>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "server/rpc/context.h"

namespace prefilld {
namespace {

// Metadata of this name; empty where it is there more than once, which is no credential.
std::optional<std::string> HeaderOf(const grpc::CallbackServerContext& context, const char* name) {
  const auto [first, last] = context.client_metadata().equal_range(name);
  if (first == last) return std::nullopt;
  if (std::next(first) != last) return "";
  return std::string(first->second.data(), first->second.size());
}

Credentials CredentialsOf(const grpc::CallbackServerContext& context) {
  Credentials credentials;
  credentials.peer = context.peer();
  credentials.authorization = HeaderOf(context, "authorization");
  credentials.tenant = HeaderOf(context, "prefilld-tenant");
  const auto auth = context.auth_context();
  for (const auto& type :  // one in the clear has a type, too
       auth->FindPropertyValues(GRPC_TRANSPORT_SECURITY_TYPE_PROPERTY_NAME)) {
    credentials.tls = type == GRPC_SSL_TRANSPORT_SECURITY_TYPE;
  }
  for (const auto& [property, prefix] : {std::pair(GRPC_PEER_URI_PROPERTY_NAME, "URI:"),
                                         std::pair(GRPC_PEER_DNS_PROPERTY_NAME, "DNS:"),
                                         std::pair(GRPC_X509_CN_PROPERTY_NAME, "CN:")}) {
    for (const grpc::string_ref& name : auth->FindPropertyValues(property)) {
      credentials.certificate.push_back(prefix + std::string(name.data(), name.size()));
    }
  }
  return credentials;
}

// gRPC takes more, as it would end the connection, with all who share it, for one call's.
constexpr size_t kMetadataBytesMax = 16 << 10;

absl::Status CheckMetadata(const grpc::CallbackServerContext& context) {
  size_t bytes = 0;
  for (const auto& [name, value] : context.client_metadata()) bytes += name.size() + value.size();
  if (bytes <= kMetadataBytesMax) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("the metadata of the call has ", bytes,
                                                   " bytes, the limit is ", kMetadataBytesMax));
}

absl::StatusOr<Caller> CallerOf(RpcContext& rpc, const grpc::CallbackServerContext& context,
                                Rpc which) {
  if (absl::Status status = CheckMetadata(context); !status.ok()) return status;
  return rpc.access.Admit(which, CredentialsOf(context));
}

}  // namespace

CallRecord::CallRecord(RpcContext& rpc, const grpc::CallbackServerContext& context, Rpc which)
    : metrics_(rpc.metrics), live_(rpc.calls), rpc_(which), caller_(CallerOf(rpc, context, which)) {
  live_.Add(1);
}

}  // namespace prefilld
