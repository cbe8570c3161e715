#include "server/rpc/peer.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"

namespace prefilld {
namespace {

// "2001:db8:1:2::" of "2001:db8:1:2:3:4:5:6", "10.0.0.1" of "::ffff:10.0.0.1".
std::string NetworkOf(const std::string& host) {
  in6_addr address;
  if (inet_pton(AF_INET6, host.substr(0, host.find('%')).c_str(), &address) != 1) return host;
  char text[INET6_ADDRSTRLEN] = "";
  if (IN6_IS_ADDR_V4MAPPED(&address)) {
    return inet_ntop(AF_INET, &address.s6_addr[12], text, sizeof text);
  }
  std::memset(&address.s6_addr[8], 0, 8);
  return inet_ntop(AF_INET6, &address, text, sizeof text);
}

}  // namespace

std::string PeerOfAddress(absl::string_view address) {
  if (absl::StartsWith(address, "unix")) return "unix";
  const size_t kind = address.find(':'), port = address.rfind(':');
  if (kind == absl::string_view::npos || port <= kind) return std::string(address);
  std::string host(address.substr(kind + 1, port - kind - 1));
  if (absl::ConsumePrefix(&address, "ipv4:")) return host;
  host = absl::StrReplaceAll(host, {{"%5B", ""}, {"%5D", ""}, {"[", ""}, {"]", ""}});
  return NetworkOf(host);
}

std::string PeerOf(const Caller& caller) {
  return caller.tenant.empty() ? PeerOfAddress(caller.peer) : "tenant:" + caller.tenant;
}

}  // namespace prefilld
