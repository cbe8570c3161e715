// Who a client is, and whom it takes for its server: TLS, a certificate of its own, a token. Pure
// but for the files, which are read when a connection is made, the token's at every call: they may
// be replaced while a client lives.
#pragma once

#include <grpcpp/security/credentials.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace prefilld::client {

// Paths of PEM files, and names; empty: none.
struct Credentials {
  std::string tls_ca;  // who may have signed the server's certificate; empty: in the clear
  std::string tls_cert, tls_key;  // the client's own, for a server that asks for one
  std::string token_file;         // a bearer token for every call; only over TLS, or to this host
  std::string server_name;  // that the server's certificate must be of; empty: the target's host
};

// INVALID_ARGUMENT names what cannot be used for this target, and its file.
absl::Status CheckCredentials(const Credentials& credentials, const std::string& target);

// With what is in the files now.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ChannelCredentialsOf(
    const Credentials& credentials);

// Another one once a file of TLS is another, or has other contents.
std::string StampOf(const Credentials& credentials);

// What is in token_file, without the space around it.
absl::StatusOr<std::string> TokenOf(const Credentials& credentials);

// UNAUTHENTICATED says in words what a handshake with `target` fails of; OK: of nothing, or there
// is nobody. Connects; blocks for some seconds at most.
absl::Status WhyNoHandshake(const Credentials& credentials, const std::string& target);

}  // namespace prefilld::client
