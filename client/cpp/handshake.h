// A TLS handshake of our own, for its words: gRPC says of one that failed little more than that the
// socket was closed. Threads: any.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "client/cpp/credentials.h"

namespace prefilld::client {

// Of HOST:PORT or [IPV6]:PORT; empty where the target is neither.
std::string HostOf(const std::string& target);

// INVALID_ARGUMENT names the file that holds no certificate in PEM, or none with its key.
absl::Status CheckPem(const Credentials& credentials);

}  // namespace prefilld::client
