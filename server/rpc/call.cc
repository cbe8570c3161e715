#include "server/rpc/call.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>

#include <string>
#include <tuple>

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

size_t MetadataBytesOf(const grpc::CallbackServerContext& context) {
  size_t bytes = 0;
  for (const auto& [name, value] : context.client_metadata()) bytes += name.size() + value.size();
  return bytes;
}

absl::StatusOr<Caller> CallerOf(RpcContext& rpc, const grpc::CallbackServerContext& context,
                                Rpc which) {
  absl::Status status = rpc.access.CheckMetadata(which, context.peer(), MetadataBytesOf(context));
  if (!status.ok()) return status;
  return rpc.access.Admit(which, CredentialsOf(context));
}

}  // namespace

CallRecord::CallRecord(RpcContext& rpc, const grpc::CallbackServerContext& context, Rpc which)
    : metrics_(rpc.metrics), live_(rpc.calls), rpc_(which), caller_(CallerOf(rpc, context, which)) {
  live_.Add(1);
}

}  // namespace prefilld
