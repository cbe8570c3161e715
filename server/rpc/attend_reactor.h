// One Attend call: header, admission, upload, computation, outputs, summary. Raw buffers, so that
// tensor bytes are copied once on their way in and not at all on their way out. Over posix_shm and
// cuda_ipc the caller writes into memory that the job computes in, and reads its outputs there. A
// device with memory of its own gets them from pinned host memory while they arrive (Staging), and
// the outputs come back there; only over cuda_ipc nothing moves.
//
// Lifetime: shared by gRPC (until OnDone), the job (as its sink) and what is posted.
// Threads: gRPC's, the completion thread and those of two pools, where memory is taken and copied;
// every member is guarded by one mutex, held for no longer than a message takes, but what belongs
// to the upload, which only the single outstanding read touches, or what goes on from it.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/job.h"
#include "server/rpc/attend_memory.h"
#include "server/rpc/attend_outputs.h"
#include "server/rpc/call.h"
#include "server/rpc/context.h"
#include "server/rpc/peer.h"
#include "server/rpc/upload.h"
#include "server/rpc/validate.h"
#include "server/work_pool.h"

namespace prefilld {

class AttendReactor final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                            public JobSink,
                            public LiveCalls::Endless,
                            public Sweeper::Swept,
                            public std::enable_shared_from_this<AttendReactor> {
 public:
  static AttendReactor* Start(RpcContext& rpc, grpc::CallbackServerContext* context);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  void OnDrain() override;

  void OnLayerReady(int, double, double) override {}
  void OnFinished(const absl::Status& status) override;
  void OnSweep() override;

 private:
  AttendReactor(RpcContext& rpc, grpc::CallbackServerContext* context);

  void GiveWay();  // to a later call with the same id
  void OnHeader();
  absl::StatusOr<ValidAttend> Admit();
  absl::Status OnTensors();
  void OnArrived(const absl::Status& status);
  // On a pool's thread; they take and copy memory outside the lock.
  void PlaceTensors(const ValidAttend& valid);
  void CopyRegion();
  void Conclude(const absl::Status& result);

  v1::AttendResponse Admission(Transport transport) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LetGoOfInputs() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Answer() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Write(const grpc::ByteBuffer& message) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Refuse(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // How long it may stand still while the peer has to move something.
  absl::Duration Patience() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What the peer has to move from now on.
  void BeginTransfer(uint64_t moved) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Ids are each caller's own.
  LiveIds::Id OwnId(const std::string& request_id) const {
    return {PeerOf(*record_.caller()), record_.caller()->identity, request_id};
  }
  bool copies_region() const { return memory_.region != nullptr && memory_.staging != nullptr; }

  RpcContext& rpc_;
  grpc::CallbackServerContext* const context_;
  const SteadyTime deadline_;
  grpc::ByteBuffer read_;         // of the outstanding read
  std::optional<Upload> upload_;  // the outstanding read's thread
  bool ragged_ = false;           // set once, before the first tensor is read, as is the memory
  AttendMemory memory_;

  CallRecord record_;  // ended under the lock
  absl::Mutex mutex_;
  std::shared_ptr<AttendReactor> self_ ABSL_GUARDED_BY(mutex_);  // until OnDone
  std::string request_id_ ABSL_GUARDED_BY(mutex_);               // for the log
  bool awaits_header_ ABSL_GUARDED_BY(mutex_) = true;
  // The peer is waited for less: the server drains, or a later call has taken its place.
  bool hurries_ ABSL_GUARDED_BY(mutex_) = false;
  std::shared_ptr<Job> job_ ABSL_GUARDED_BY(mutex_);  // once in the budget, until OnDone
  bool admitted_ ABSL_GUARDED_BY(mutex_) = false;     // and there is memory
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;         // it is our turn, the peer has nothing to do
  bool job_ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;  // Finish was called
  uint64_t bytes_to_come_ ABSL_GUARDED_BY(mutex_) = 0;
  std::shared_ptr<AttendOutputs> outputs_ ABSL_GUARDED_BY(mutex_);
  absl::Duration placing_ ABSL_GUARDED_BY(mutex_);  // outputs, after the job
  bool summary_written_ ABSL_GUARDED_BY(mutex_) = false;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ByteBuffer write_ ABSL_GUARDED_BY(mutex_);                // of the outstanding write
  std::optional<grpc::ByteBuffer> next_ ABSL_GUARDED_BY(mutex_);  // encoded while it is written
  SteadyTime progress_ ABSL_GUARDED_BY(mutex_) = SteadyNow();
  // Of tensors that come, or of outputs that go: since when, and bytes that have by now, or of
  // memory that the peer fills by itself, that will have.
  SteadyTime transfer_began_ ABSL_GUARDED_BY(mutex_) = SteadyNow();
  uint64_t moved_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace prefilld
