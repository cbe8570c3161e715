// gRPC's credentials: TLS by files that may change, or none.
#pragma once

#include <grpcpp/security/server_credentials.h>

#include <memory>

#include "server/rpc/tls_files.h"

namespace prefilld {

// tls: null: plaintext; outlives them. need_certificate: where a client CA is named, who has no
// certificate of it is not let in; else it is let in as nobody.
std::shared_ptr<grpc::ServerCredentials> ServerCredentialsOf(const TlsFiles* tls,
                                                             bool need_certificate);

}  // namespace prefilld
