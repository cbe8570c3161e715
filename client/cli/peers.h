// The callers that a load comes from, each on a connection of its own.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/client.h"

namespace prefilld::cli {

// Thread-safe; nothing blocks but the connecting.
class Peer {
 public:
  // One that has a client already.
  explicit Peer(client::PrefillClient& client) : client_(&client, [](auto*) {}) {}
  // A plaintext connection to `target`, IPV4:PORT, from `source`, an IPv4 address of this host; ""
  // is whatever the system takes. gRPC itself cannot choose the source, so the socket is ours.
  Peer(std::string target, std::string source)
      : target_(std::move(target)), source_(std::move(source)) {}

  const std::string& source() const { return source_; }
  // Connects where there is no connection. UNAVAILABLE and such where that fails.
  absl::StatusOr<std::shared_ptr<client::PrefillClient>> Client();
  // Of no use any more: the next call connects anew. gRPC does so itself where the socket is its
  // own.
  void Drop(const std::shared_ptr<client::PrefillClient>& client);

 private:
  const std::string target_, source_;
  std::mutex mutex_;
  std::shared_ptr<client::PrefillClient> client_;
};

// `count` of them; to a server on loopback they come from 127.0.1.1, 127.0.1.2 and so on.
absl::StatusOr<std::vector<std::unique_ptr<Peer>>> MakePeers(const std::string& target,
                                                             size_t count);

}  // namespace prefilld::cli
