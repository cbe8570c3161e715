// One Prefill call: reads a PrefillStream's events to its caller, from the first on. Shared by gRPC
// (until OnDone) and the stream.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "server/rpc/call.h"
#include "server/rpc/context.h"
#include "server/rpc/prefill_stream.h"

namespace prefilld {

class PrefillReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                             public PrefillStream::Reader,
                             public std::enable_shared_from_this<PrefillReactor> {
 public:
  static PrefillReactor* Start(RpcContext& rpc, grpc::CallbackServerContext* context,
                               const grpc::ByteBuffer& request);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  void OnEvents() override;
  SteadyTime deadline() const override { return deadline_; }
  bool broke() const override { return broke_; }

 private:
  PrefillReactor(RpcContext& rpc, grpc::CallbackServerContext* context);
  // Null when the request only had to be checked.
  absl::StatusOr<std::shared_ptr<PrefillStream>> Admit(const v1::PrefillRequest& request);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Lose() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);  // the caller
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  RpcContext& rpc_;
  grpc::CallbackServerContext* const context_;  // until OnDone
  const SteadyTime deadline_;
  std::atomic<bool> broke_{false};
  CallRecord record_;  // ended under the lock
  absl::Mutex mutex_;
  std::shared_ptr<PrefillReactor> self_ ABSL_GUARDED_BY(mutex_);  // until OnDone
  std::shared_ptr<PrefillStream> stream_ ABSL_GUARDED_BY(mutex_);
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0;  // event to write
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ByteBuffer write_ ABSL_GUARDED_BY(mutex_);  // of the outstanding write
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;      // Finish was called
};

}  // namespace prefilld
