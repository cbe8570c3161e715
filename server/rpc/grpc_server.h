// gRPC's server: our services on the connections that our Acceptor takes, and what any peer can
// cost (docs/limits.md). Built when all that calls need is; owned by Server.
#pragma once

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/health.h"
#include "server/rpc/acceptor.h"
#include "server/rpc/connection_guard.h"
#include "server/rpc/context.h"
#include "server/rpc/self_check.h"
#include "server/rpc/services.h"

namespace prefilld {

struct GrpcOptions {
  std::shared_ptr<grpc::ServerCredentials> credentials;
  std::vector<int> listeners;  // Acceptor's
  ConnectionLimits connections;
  uint64_t memory_bytes = uint64_t{512} << 20;  // of messages that arrive, streams and connections
  absl::Duration connection_age = absl::Minutes(30);  // then a peer is asked to come anew
  int message_bytes_max = 0;
  bool reflection = true;
  bool tls = false;  // what the credentials are
};

class GrpcServer {
 public:
  // Serves when it returns. Tells gRPC's clients of `health`, and it when the port does not serve.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(RpcContext& rpc, Health& health,
                                                           GrpcOptions options);
  ~GrpcServer();

  // Takes no connection any more; ends calls after `most`. Blocks until then, or all have ended.
  void Shutdown(absl::Duration most);

 private:
  GrpcServer(RpcContext& rpc, Health& health)
      : health_(health), prefill_(rpc), handoff_(rpc), models_(rpc) {}
  void Check(SelfCheckOptions options);

  Health& health_;
  PrefillServiceImpl prefill_;
  KvHandoffServiceImpl handoff_;
  ModelServiceImpl models_;
  std::unique_ptr<grpc::Server> grpc_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> connections_;
  std::unique_ptr<Acceptor> acceptor_;
  std::unique_ptr<ConnectionGuard> guard_;
  std::unique_ptr<SelfCheck> self_check_;
};

}  // namespace prefilld
