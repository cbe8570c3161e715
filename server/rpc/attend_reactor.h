// One Attend call: header, admission, upload, computation, outputs, summary. Raw buffers, so that
// tensor bytes are copied once on their way in and not at all on their way out. Over posix_shm the
// caller writes into a segment that the job computes in, and reads its outputs there.
//
// Lifetime: shared by gRPC (until OnDone) and the job (as its sink).
// Threads: gRPC's and the scheduler's; every member is guarded by one mutex but the upload, which
// only the single outstanding read touches.
#pragma once

#include <grpcpp/alarm.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <array>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/job.h"
#include "server/rpc/attend_outputs.h"
#include "server/rpc/call.h"
#include "server/rpc/context.h"
#include "server/rpc/upload.h"
#include "server/rpc/validate.h"

namespace prefilld {

class AttendReactor final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                            public JobSink,
                            public std::enable_shared_from_this<AttendReactor> {
 public:
  static AttendReactor* Start(RpcContext& rpc, grpc::CallbackServerContext* context);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  void OnLayerReady(int, double, double) override {}
  void OnFinished(const absl::Status& status) override;

 private:
  AttendReactor(RpcContext& rpc, grpc::CallbackServerContext* context);

  absl::Status OnHeader() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status AllocateBuffers(AttendWork& work, const std::array<int, 3>& roles);
  absl::Status AllocateSegment(const ValidAttend& valid);
  absl::Status OnTensors();
  void Write(const grpc::ByteBuffer& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Watch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnAlarm();

  RpcContext& rpc_;
  grpc::CallbackServerContext* const context_;
  const absl::Time deadline_;
  grpc::ByteBuffer read_;         // of the outstanding read
  std::optional<Upload> upload_;  // the outstanding read's thread
  AttendSegment segment_;         // set once, with the job; empty over gRPC

  absl::Mutex mutex_;
  std::shared_ptr<AttendReactor> self_ ABSL_GUARDED_BY(mutex_);  // until OnDone
  CallRecord record_ ABSL_GUARDED_BY(mutex_);
  std::string request_id_ ABSL_GUARDED_BY(mutex_);    // for the log
  std::shared_ptr<Job> job_ ABSL_GUARDED_BY(mutex_);  // once admitted, until OnDone
  bool ragged_ ABSL_GUARDED_BY(mutex_) = false;
  bool computing_ ABSL_GUARDED_BY(mutex_) = false;  // uploaded, the peer has nothing to do
  bool job_ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;  // Finish was called
  uint64_t bytes_to_come_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<AttendOutputs> outputs_ ABSL_GUARDED_BY(mutex_);
  bool summary_written_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ByteBuffer write_ ABSL_GUARDED_BY(mutex_);                // of the outstanding write
  std::optional<grpc::ByteBuffer> next_ ABSL_GUARDED_BY(mutex_);  // encoded while it is written
  absl::Time progress_ ABSL_GUARDED_BY(mutex_) = absl::Now();
  std::unique_ptr<grpc::Alarm> alarm_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld
