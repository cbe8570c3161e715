// The server: every part of the process, built once, in order, and taken down in the opposite one.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/health.h"
#include "server/http.h"
#include "server/port.h"
#include "server/rpc/context.h"
#include "server/rpc/grpc_server.h"
#include "server/rpc/tls_files.h"

namespace prefilld {

class Server {
 public:
  // Serves when it returns. Errors are one line for the operator.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Config& config);
  ~Server();

  const Endpoint& grpc_endpoint() const { return held_port_->endpoint(); }  // with the real port
  const Endpoint& http_endpoint() const { return http_->endpoint(); }

  // Not ready from now on; finishes what runs and waits until leases are consumed or expired, all
  // within the drain timeout; then cuts off what is left. Blocks; once.
  void Drain();
  // A fault took the device: the process ends by SIGTERM to itself, and must not exit with 0.
  bool device_lost() const { return !backend_->device().fault().empty(); }
  // Takes the path of --memory_socket away: for an exit that destroys nothing. Any thread; no call
  // can have new memory that is mapped afterwards.
  void CloseMedia();

  // For tests of what must not wait for them.
  WorkPool& memory() { return *memory_; }
  WorkPool& transfers() { return transfers_; }

 private:
  explicit Server(Config config);
  absl::Status PrepareGrpc();
  absl::Status StartHttp();
  absl::Status LoadModels();
  // What it finds out of memory is written to the options.
  absl::Status PlanMemory(SchedulerOptions& options);
  absl::Status OpenMedia();
  absl::Status OpenMemorySocket(std::shared_ptr<RegionNames> names);
  // The transport whose caches lie in a pool in this memory, if any: the device's, or the host's.
  const TransportRow* PooledRow(bool on_device) const;
  void MakePool(Transport transport, uint64_t bytes);
  absl::Status TakeKvMemory();
  ModelInfos Infos() const;
  absl::Status StartGrpc();
  void Watch();
  void CheckModels();
  void RefreshCredentials();
  [[noreturn]] void EndStalled(const StalledStep& step);

  const Config config_;
  const std::string boot_id_ = NewId();
  std::unique_ptr<TlsFiles> tls_;  // null: plaintext
  std::shared_ptr<grpc::ServerCredentials> credentials_;
  std::optional<HeldPort> held_port_;  // listened on from StartGrpc on
  // In the order they are built; each may use those above it.
  Metrics metrics_;
  std::unique_ptr<Access> access_;
  Health health_;
  ReportTable reports_;
  LiveIds attends_;
  LiveCalls calls_;
  // Often enough for what it looks at.
  Sweeper sweeper_{
      std::clamp(config_.upload_timeout / 4, absl::Milliseconds(10), absl::Seconds(1))};
  PrefillRegistry prefills_;
  std::unique_ptr<Backend> backend_;
  Models models_;
  Media media_;
  std::unique_ptr<DescriptorSocket> memory_socket_;  // null: nothing is mapped
  const std::shared_ptr<WorkPool> memory_ = std::make_shared<WorkPool>(config_.memory_threads);
  WorkPool transfers_{config_.transfer_threads};
  DescriptorShares descriptors_;
  RequestLimits limits_;             // each is known when what it limits is built
  std::unique_ptr<BlockPool> pool_;  // null without models
  SegmentPools segments_;            // see RpcContext
  std::unique_ptr<LeaseTable> leases_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<RpcContext> rpc_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<GrpcServer> grpc_;
  absl::Notification built_;  // all that metrics ask when they are read, which is from the start
  Bell stopping_;             // for watch_
  std::thread watch_;
};

}  // namespace prefilld
