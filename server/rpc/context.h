// What every RPC works on. Owned by the server, outlives every call; the parts are thread-safe.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "server/kv/block_pool.h"
#include "server/kv/lease_table.h"
#include "server/model/transformer.h"
#include "server/record/metrics.h"
#include "server/record/reports.h"
#include "server/rpc/access.h"
#include "server/rpc/call.h"
#include "server/rpc/live_ids.h"
#include "server/rpc/prefill_registry.h"
#include "server/rpc/sweeper.h"
#include "server/rpc/validate.h"
#include "server/scheduler/scheduler.h"
#include "server/transport/segment_pool.h"
#include "server/transport/transports.h"
#include "server/work_pool.h"

namespace prefilld {

using Models = std::map<std::string, std::unique_ptr<Transformer>>;  // by name, set at start

struct RpcContext {
  Backend& backend;
  const Models& models;
  const Media& media;
  BlockPool* pool;               // null when there is no model
  const SegmentPools& segments;  // of a transport whose caches have none they take blocks
  LeaseTable& leases;
  Scheduler& scheduler;
  PrefillRegistry& prefills;
  LiveIds& attends;
  LiveCalls& calls;
  Sweeper& sweeper;
  ReportTable& reports;
  Metrics& metrics;
  Access& access;
  // Takes memory from the system and gives it back, which may take a second a gigabyte. Shared with
  // what may be let go of after the server.
  std::shared_ptr<WorkPool> memory;
  WorkPool& transfers;  // checksums, conversion, copies: what calls do beside the engine
  RequestLimits limits;
  int waiting_jobs_max = 0;
  // An Attend whose peer moves no chunk for this long, in either direction, is given up.
  absl::Duration upload_timeout = absl::Seconds(30);
  // Bytes a second that its tensors move at in the mean, after that time; likewise.
  uint64_t transfer_rate_min = uint64_t{256} << 10;
  std::string boot_id;
  std::string memory_socket;  // where regions are opened; empty: there are none
  // Whether the connection of a call's peer (grpc::ServerContext::peer()) is there: a call that
  // ends on one was taken back, else it broke. By GrpcServer.
  std::function<bool(const std::string& peer)> connected;
};

// INVALID_ARGUMENT about `field` for a name that no model can have, PERMISSION_DENIED for one that
// the caller may not use, else NOT_FOUND, with those that it may.
absl::StatusOr<Transformer*> FindModel(const RpcContext& rpc, Rpc which, const Caller& caller,
                                       const std::string& name, const char* field);
// Of the caller, or of somebody whose caches it may have: else NOT_FOUND. FAILED_PRECONDITION for
// another generation.
absl::StatusOr<LeaseTable::Found> FindLease(const RpcContext& rpc, Rpc which, const Caller& caller,
                                            const std::string& name, uint64_t generation);

}  // namespace prefilld
