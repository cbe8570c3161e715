// Who calls, as far as shares of the server go: all connections of one peer have one share.
#pragma once

#include <string>

#include "absl/strings/string_view.h"
#include "server/caller.h"

namespace prefilld {

// The caller's tenant; without an access policy the address that the call comes from, without its
// port: of IPv6 its network, as whoever has one has 2^64 addresses of it.
std::string PeerOf(const Caller& caller);
// Of grpc::ServerContextBase::peer()'s words: "ipv4:10.0.0.1:4711", "ipv6:%5B2001:db8::1%5D:4711",
// "unix:/path".
std::string PeerOfAddress(absl::string_view address);

}  // namespace prefilld
