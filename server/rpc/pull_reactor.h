// One PullKv call: the chunks of a cache's layers, each as soon as it is computed. Payload slices
// point into the pinned blocks and hold the pin, so bytes are copied by nobody before the socket,
// and blocks are free when the last slice is. While one chunk is written the next is made ready.
// Where the caller opens what the cache lies in, a chunk is a whole tensor and only says where.
//
// Checksums, conversion and writes are the work of a pool (RpcContext::transfers): neither gRPC's
// few threads nor the one that commits layers waits for them. Shared by gRPC (until OnDone) and by
// what is posted; waits for a layer through its Transfer.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "proto/wire/chunk.h"
#include "server/kv/kv_cache.h"
#include "server/rpc/call.h"
#include "server/rpc/context.h"
#include "server/rpc/validate.h"

namespace prefilld {

class PullReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                          public std::enable_shared_from_this<PullReactor> {
 public:
  // request: a serialised PullKvRequest.
  static PullReactor* Start(RpcContext& rpc, grpc::CallbackServerContext* context,
                            const grpc::ByteBuffer& request);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  struct Position {
    int layer = 0;
    int tensor = 0;
    uint64_t offset = 0;
  };
  struct Chunk {
    grpc::ByteBuffer message;
    uint64_t payload_bytes = 0;  // sent, or named
    int ends_layer = -1;         // the layer whose last chunk this is
    Position end;                // where the next one starts
  };

  PullReactor(RpcContext& rpc, grpc::CallbackServerContext* context);
  absl::Status Open(const grpc::ByteBuffer& bytes) ABSL_LOCKS_EXCLUDED(mutex_);
  void Schedule() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);  // Run, unless it does
  // On the pool's threads.
  void Run() ABSL_LOCKS_EXCLUDED(mutex_);
  void OnLayer(const absl::StatusOr<std::shared_ptr<const KvCache::Pin>>& pin);
  void AskForLayer(int layer, std::shared_ptr<KvCache::Transfer> transfer)
      ABSL_LOCKS_EXCLUDED(mutex_);
  Chunk Encode(const Position& from, const std::shared_ptr<const KvCache::Pin>& pin) const;
  grpc::ByteBuffer Bytes(ChunkHeader header, size_t bytes,
                         const std::shared_ptr<const KvCache::Pin>& pin) const;
  grpc::ByteBuffer Place(const ChunkHeader& header, const KvCache::Pin& pin) const;

  void EndCancelled() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void End(const absl::Status& status, const char* failure) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  RpcContext& rpc_;
  grpc::CallbackServerContext* const context_;
  const SteadyTime deadline_;
  CallRecord record_;  // ended under the lock
  absl::Mutex mutex_;
  std::shared_ptr<PullReactor> self_ ABSL_GUARDED_BY(mutex_);       // until OnDone
  std::string request_id_ ABSL_GUARDED_BY(mutex_);                  // of the lease; for the log
  Transport transport_ ABSL_GUARDED_BY(mutex_) = Transport::kGrpc;  // also of a refused pull
  ValidPull range_;                                                 // set by Open, then constant
  uint64_t tensor_bytes_ = 0;                                       // as range_
  std::shared_ptr<KvCache> cache_ ABSL_GUARDED_BY(mutex_);
  // Until OnDone, and while Run asks it for a layer.
  std::shared_ptr<KvCache::Transfer> transfer_ ABSL_GUARDED_BY(mutex_);

  bool running_ ABSL_GUARDED_BY(mutex_) = false;  // Run is posted, or runs
  Position position_ ABSL_GUARDED_BY(mutex_);     // where the next chunk starts; moved by Run
  std::shared_ptr<const KvCache::Pin> pin_ ABSL_GUARDED_BY(mutex_);  // of that layer
  bool asked_ ABSL_GUARDED_BY(mutex_) = false;                       // for it

  std::optional<Chunk> next_ ABSL_GUARDED_BY(mutex_);
  Chunk write_ ABSL_GUARDED_BY(mutex_);  // of the outstanding write
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;  // Finish was called
  bool aborted_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace prefilld
