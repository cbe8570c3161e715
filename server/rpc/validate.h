// Where proto ends: requests become jobs here, after every check that needs nothing but the
// request, the limits and the model. A refusal is INVALID_ARGUMENT naming the field, the value and
// the limit, or UNIMPLEMENTED naming what exists. Pure functions; any thread.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "prefilld/v1/kv_handoff_service.pb.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "server/engine/prompt_limits.h"
#include "server/job.h"
#include "server/kv/kv_cache.h"
#include "server/kv/layout.h"
#include "server/model/transformer.h"
#include "server/transport/transports.h"

namespace prefilld {

struct RequestLimits {
  int64_t prompt_tokens_max = 131072;             // tokens of one Prefill, whatever its model
  KvShares kv;                                    // that its cache lies in
  uint64_t attend_bytes_max = uint64_t{4} << 30;  // q, k, v, outputs and block index of one Attend
  absl::Duration lease_ttl = absl::Minutes(1);    // when the request names none
  absl::Duration lease_ttl_max = absl::Minutes(10);
  std::set<Transport> offered;  // beside gRPC, which always is
  // Of these, which KV caches may lie in: the bytes that one may ever have there.
  std::map<Transport, uint64_t> kv_regions;
  bool device_memory = false;  // the device has memory of its own
};
inline constexpr int kSequencesMax = 1024;  // of one Attend

// Whether a cache over this transport takes blocks: where it lies in them, or where they stand for
// the memory of its region. Else a pool counts it.
bool TakesBlocks(Transport transport, const RequestLimits& limits);

// The longest prompt of a model whose cache is retained, which is what the server says of it; or
// passes through; or has to lie in what this transport has.
int64_t PromptTokensMax(const ModelInfo& info, const RequestLimits& limits, bool retain = true,
                        Transport transport = Transport::kGrpc);

// The largest message that is taken: a chunk, or the longest prompt, whose token IDs are varints,
// each with a tag where they are not packed.
int MessageBytesMax(const ModelInfos& models, const RequestLimits& limits);

struct ValidAttend {
  std::shared_ptr<Job> job;  // without buffers and sink
  Transport transport = Transport::kGrpc;
  std::array<int, 3> roles;  // of the announced tensors, in their order: 0 q, 1 k, 2 v
  bool ragged = false;       // cu_seqlens were given
};
absl::StatusOr<ValidAttend> ValidateAttend(const v1::AttendHeader& header,
                                           const RequestLimits& limits);

struct ValidPrefill {
  std::shared_ptr<Job> job;  // without model, cache and sink
  bool retain = true;
  // Where the cache is to lie, kGrpc: in blocks; or in blocks after all, unless it is pinned: the
  // caller has named it.
  Transport transport = Transport::kGrpc;
  bool pinned = false;
  absl::Duration lease_ttl;
  std::shared_ptr<void> ahead;  // Scheduler::TakeAhead's, until it is admitted
};
absl::StatusOr<ValidPrefill> ValidatePrefill(const v1::PrefillRequest& request,
                                             const ModelInfo& info, const RequestLimits& limits);

// The caller's id, or a new one when it has none.
absl::StatusOr<std::string> ValidateRequestId(const std::string& id);
std::string NewId();
inline constexpr size_t kRequestIdBytesMax = 64;

absl::Status ValidatePriority(int32_t priority);

// FAILED_PRECONDITION for a layout that is legal but not served: it has no row in kKvLayouts.
// Returns what to send of a cache of this geometry.
absl::StatusOr<KvForm> ValidateLayout(const v1::KvLayout& layout, const std::string& field,
                                      const KvGeometry& cache);
// INVALID_ARGUMENT for one that has no row in kTransports, UNIMPLEMENTED for one that does not
// carry this, FAILED_PRECONDITION for one that is not offered for it. Unspecified is gRPC.
enum class Carries { kTensors, kKvCache };
inline constexpr char kNoRoomForCaches[] = " has no room for KV caches on this server";
absl::StatusOr<Transport> ValidateTransport(v1::Transport transport, const std::string& field,
                                            Carries what, const RequestLimits& limits);
// `absent` when the message is; else > 0 and at most limits.lease_ttl_max.
absl::StatusOr<absl::Duration> ValidateLeaseTtl(bool present, const google::protobuf::Duration& ttl,
                                                const std::string& field,
                                                const RequestLimits& limits, absl::Duration absent);

// The part of a cache that a PullKv asks for.
struct ValidPull {
  int first_layer = 0;
  int end_layer = 0;
  int tensor = 0;            // 0 K, 1 V; where to start within first_layer
  uint64_t byte_offset = 0;  // within that tensor
  uint64_t chunk_bytes = 0;  // in a region: of a whole tensor
  Transport transport = Transport::kGrpc;
  KvForm form;
};
absl::StatusOr<ValidPull> ValidatePull(const v1::PullKvRequest& request, const KvCache& cache,
                                       const RequestLimits& limits);

}  // namespace prefilld
