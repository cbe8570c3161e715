#include "server/rpc/grpc_server.h"

#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/resource_quota.h>

#include <algorithm>
#include <climits>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/synchronization/mutex.h"
#include "server/record/log.h"
#include "server/rpc/call.h"

namespace prefilld {
namespace {

constexpr char kReadyService[] = "prefilld.v1.PrefillService";
constexpr int kKeepaliveMs = 60'000;  // a peer that is gone without a word is noticed by then
constexpr int kKeepaliveTimeoutMs = 20'000;
constexpr int kPeersKeepaliveMs = 5'000;  // peers may ask as often whether we are there
constexpr int kHandshakeMs = 20'000;      // TLS, and HTTP/2's first words
constexpr int kStreamsPerConnectionMax = 128;
// gRPC ends a connection, with all who share it, for one call's metadata beyond this; CallRecord
// refuses less.
constexpr int kMetadataBytesMax = 256 << 10;
// Of reflection, each of whose streams holds one: the only service that is not ours nor
// asynchronous.
constexpr int kSyncThreadsMax = 8;
// What runs on a connection that is too old may end in peace for so long.
constexpr absl::Duration kAgeGrace = absl::Minutes(10);

// gRPC's own log is quiet until the server serves (our one line tells why it does not), then ours.
void DropGrpcLog(gpr_log_func_args*) {}
// It belongs to the process. What it says of handshakes is the only word of who did not get in.
ABSL_CONST_INIT absl::Mutex handshakes_mutex(absl::kConstInit);
Access* handshakes_access ABSL_GUARDED_BY(handshakes_mutex) = nullptr;

void TellOfHandshakes(Access* access) {
  absl::MutexLock lock(&handshakes_mutex);
  handshakes_access = access;
}

void TakeGrpcLog(gpr_log_func_args* args) {
  if (args->severity != GPR_LOG_SEVERITY_ERROR) return;
  if (absl::EndsWith(args->file, "ssl_transport_security.cc") &&
      absl::StrContains(args->message, "Handshake failed")) {
    absl::MutexLock lock(&handshakes_mutex);
    if (handshakes_access != nullptr) handshakes_access->HandshakeFailed("grpc", "", args->message);
    return;
  }
  Log(Level::kWarning, "grpc", {{"file", args->file}, {"message", args->message}});
}

// Linked in, it is in every server.
class WithoutReflection : public grpc::ServerBuilderOption {
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->erase(std::remove_if(plugins->begin(), plugins->end(),
                                  [](const auto& plugin) {
                                    return plugin->name().find("reflection") != std::string::npos;
                                  }),
                   plugins->end());
  }
};

void Bound(const GrpcOptions& options, grpc::ServerBuilder* builder) {
  const auto milliseconds = [](absl::Duration duration) {
    return static_cast<int>(std::min<int64_t>(absl::ToInt64Milliseconds(duration), INT_MAX));
  };
  builder->SetResourceQuota(
      grpc::ResourceQuota("prefilld").Resize(options.memory_bytes).SetMaxThreads(kSyncThreadsMax));
  builder->SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder->SetMaxReceiveMessageSize(options.message_bytes_max);
  const std::pair<const char*, int> arguments[] = {
      {GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs},
      {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs},
      {GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kPeersKeepaliveMs},
      {GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeMs},
      {GRPC_ARG_MAX_CONCURRENT_STREAMS, kStreamsPerConnectionMax},
      {GRPC_ARG_MAX_METADATA_SIZE, kMetadataBytesMax},
      // gRPC moves each by a tenth at random: peers do not come back all at once.
      {GRPC_ARG_MAX_CONNECTION_AGE_MS, milliseconds(options.connection_age)},
      {GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, milliseconds(kAgeGrace)},
  };
  for (const auto& [name, value] : arguments) builder->AddChannelArgument(name, value);
}

}  // namespace

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(RpcContext& rpc, Health& health,
                                                              GrpcOptions options) {
  gpr_set_log_function(DropGrpcLog);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  std::unique_ptr<GrpcServer> server(new GrpcServer(rpc, health));
  grpc::ServerBuilder builder;
  Bound(options, &builder);
  if (!options.reflection) builder.SetOption(std::make_unique<WithoutReflection>());
  server->connections_ = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, options.credentials);
  builder.RegisterService(&server->prefill_);
  builder.RegisterService(&server->handoff_);
  builder.RegisterService(&server->models_);
  server->grpc_ = builder.BuildAndStart();
  if (!server->grpc_) return absl::InternalError("gRPC does not start");
  TellOfHandshakes(&rpc.access);
  gpr_set_log_function(TakeGrpcLog);
  health.Tell([service = server->grpc_->GetHealthCheckService()](bool alive, bool ready) {
    service->SetServingStatus("", alive);
    service->SetServingStatus(kReadyService, ready);
  });
  const int checked = options.listeners.at(0);
  server->acceptor_ = std::make_unique<Acceptor>(
      std::move(options.listeners), options.connections,
      [&connections = *server->connections_](int listener, int fd) {
        grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
        connection.listener_fd = listener;
        connection.fd = fd;
        connections.HandleNewConnection(&connection);
      },
      rpc.metrics);
  rpc.connected = [acceptor = server->acceptor_.get()](const std::string& peer) {
    return acceptor->Connected(peer);
  };
  server->acceptor_->Start();
  server->guard_ = std::make_unique<ConnectionGuard>(
      GuardOptions{.streams = kStreamsPerConnectionMax}, *server->acceptor_);
  server->Check({.listener = checked, .tls = options.tls});
  return server;
}

void GrpcServer::Check(SelfCheckOptions options) {
  self_check_ =
      std::make_unique<SelfCheck>(options, *acceptor_, [this](const absl::Status& status) {
        const std::string why(status.message());
        Log(status.ok() ? Level::kInfo : Level::kError, status.ok() ? "reachable" : "unreachable",
            {{"message", why}});
        health_.Set(Health::kUnreachable,
                    status.ok() ? "" : "the gRPC port does not serve: " + why);
      });
}

GrpcServer::~GrpcServer() {
  health_.Tell(nullptr);
  Shutdown(absl::ZeroDuration());
  TellOfHandshakes(nullptr);
}

void GrpcServer::Shutdown(absl::Duration most) {
  self_check_.reset();
  guard_.reset();
  if (acceptor_) acceptor_->Stop();  // what comes later would be nobody's
  if (grpc_) grpc_->Shutdown(GrpcTimeIn(most));
}

}  // namespace prefilld
