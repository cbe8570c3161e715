// TLS: who may connect. Read once, at start, before models are.
#pragma once

#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace prefilld {

// PEM files. cert and key: TLS, empty: none; client_ca too: only clients with a certificate of it.
struct TlsFiles {
  std::string cert, key, client_ca;
};

// NOT_FOUND names the flag whose file cannot be read, INVALID_ARGUMENT the one whose file holds no
// PEM of its kind, or a key that is not the certificate's.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> Credentials(const TlsFiles& tls);

}  // namespace prefilld
