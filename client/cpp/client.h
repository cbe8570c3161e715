// PrefillClient: prefilld from C++.
//
//   PrefillClient client("127.0.0.1:50051");
//   auto summary = client.Prefill(request, [&](const v1::PrefillEvent& event) { ... });
//
// Every call blocks until it ends, is safe on any thread (one client serves many), honours its
// CallOptions and returns the server's status with google.rpc's details (see errors.h). A request
// without a request_id gets a random one, so that a retry attaches to the same work instead of
// running it twice.
#pragma once

#include <grpcpp/channel.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/call.h"
#include "client/cpp/credentials.h"
#include "client/cpp/tensor.h"
#include "prefilld/v1/kv_handoff_service.pb.h"
#include "prefilld/v1/model_service.pb.h"
#include "prefilld/v1/prefill_service.pb.h"

namespace prefilld::client {

// A random UUID, version 4.
std::string NewRequestId();

// Attention over the caller's own tensors.
struct AttendCall {
  v1::AttendHeader header;          // without `tensors`: they are those of `inputs`
  std::vector<InputTensor> inputs;  // q, k, v

  // Says where the outputs go: one pointer per spec, each to TensorBytes(spec) bytes that stay
  // valid until the call returns. Called once per try, before the first output byte; an error ends
  // the call with it.
  std::function<absl::StatusOr<std::vector<void*>>(const std::vector<v1::TensorSpec>&)> allocate;

  // Optional: bytes of all tensors moved so far in this direction, of how many.
  std::function<void(uint64_t sent, uint64_t total)> on_upload;
  std::function<void(uint64_t received, uint64_t total)> on_download;
};

// Layers of a leased KV cache, each K and V contiguous [kv_heads, tokens, head_dim].
struct PullCall {
  v1::Lease lease;                                     // from Admission.lease or kv_ready
  v1::DataType data_type = v1::DATA_TYPE_UNSPECIFIED;  // to convert to; unspecified: the cache's
  uint64_t tensor_bytes = 0;  // of one layer's K, and of its V, in that type
  uint32_t first_layer = 0;
  uint32_t layer_count = 0;  // 0: to the last

  // Where a layer's K (0) or V (1) goes: tensor_bytes bytes that stay valid until the call returns.
  // Called once per tensor, when its first byte is there; an error ends the call with it.
  std::function<absl::StatusOr<void*>(uint32_t layer, int tensor_index)> destination;

  std::function<void(uint32_t layer)> on_layer;  // optional: K and V of `layer` are complete
};

class PrefillClient {
 public:
  // Connects lazily: an unreachable server shows as UNAVAILABLE of the first call, credentials that
  // cannot be used as INVALID_ARGUMENT of every one, and a handshake that fails as UNAUTHENTICATED,
  // in words. Once a file of TLS has changed calls go over a new connection.
  explicit PrefillClient(const std::string& target, Credentials credentials = {});
  // Over a channel of the caller's making.
  explicit PrefillClient(std::shared_ptr<grpc::Channel> channel);
  ~PrefillClient();

  // Uploads only after admission. Checks every chunk that comes back.
  absl::StatusOr<v1::Summary> Attend(const AttendCall& call, const CallOptions& options = {});

  // `on_event` sees every event in order, on this thread; an error from it ends the call with it.
  // When the stream breaks after admission the call attaches to the same work again and the events
  // start over; ABORTED when that work is gone and the server began anew, under another lease.
  absl::StatusOr<v1::Summary> Prefill(
      v1::PrefillRequest request, absl::FunctionRef<absl::Status(const v1::PrefillEvent&)> on_event,
      const CallOptions& options = {});

  // Pulls layer after layer, following the computation. A broken pull resumes at the byte it
  // reached. The lease is neither renewed nor released.
  absl::Status PullKv(const PullCall& call, const CallOptions& options = {});

  absl::StatusOr<v1::Lease> RenewLease(const v1::RenewLeaseRequest& request,
                                       const CallOptions& options = {});
  // How many pulls still read the cache; its memory is freed after them.
  absl::StatusOr<uint32_t> ReleaseLease(const v1::Lease& lease, v1::ReleaseReason reason,
                                        const CallOptions& options = {});
  absl::StatusOr<v1::NegotiateResponse> Negotiate(const v1::NegotiateRequest& request,
                                                  const CallOptions& options = {});
  absl::StatusOr<std::vector<v1::Model>> ListModels(const CallOptions& options = {});
  absl::StatusOr<v1::Model> GetModel(const std::string& name, const CallOptions& options = {});
  absl::StatusOr<v1::SparsityReport> GetSparsityReport(const std::string& request_id,
                                                       const CallOptions& options = {});
  // grpc.health.v1: true when serving. service "": the server is live;
  // "prefilld.v1.PrefillService": it is ready for work.
  absl::StatusOr<bool> Health(const std::string& service, const CallOptions& options = {});

 private:
  struct Stubs;

  absl::StatusOr<std::shared_ptr<Stubs>> Connected();
  // RunWithRetries of calls to the server, each with the token; says why there is no connection.
  absl::Status Run(const CallOptions& options,
                   absl::FunctionRef<absl::Status(Try&, Stubs&)> attempt);
  // A unary call: `method` is a method of `stub`, one of Stubs.
  template <typename Response, typename Stub, typename Method, typename Request>
  absl::StatusOr<Response> Unary(Stub Stubs::*stub, Method method, const Request& request,
                                 const CallOptions& options);

  const std::string target_;  // empty: the channel is the caller's
  const Credentials credentials_;
  std::mutex mutex_;  // guards what follows
  std::string stamp_;
  std::shared_ptr<Stubs> stubs_;
};

}  // namespace prefilld::client
