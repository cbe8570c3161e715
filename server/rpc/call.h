// What all calls have in common: they are counted while they live and once at their end, and their
// deadline is read from the call.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/job.h"
#include "server/record/metrics.h"
#include "server/rpc/status.h"

namespace prefilld {

// How many streams of this server's services live: of others, such as health's Watch, some have no
// end. Thread-safe.
class LiveCalls {
 public:
  void Add(int more) {
    absl::MutexLock lock(&mutex_);
    count_ += more;
  }
  // Blocks until none lives, or the deadline: false.
  bool WaitNone(absl::Time deadline) const {
    absl::MutexLock lock(&mutex_);
    const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return count_ == 0; };
    return mutex_.AwaitWithDeadline(absl::Condition(&none), deadline);
  }

 private:
  mutable absl::Mutex mutex_;
  int64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

// One call from its arrival to its end. Not thread-safe.
class CallRecord {
 public:
  // live: that a stream is counted in, as long as its record lives.
  CallRecord(Metrics& metrics, const char* method, LiveCalls* live = nullptr)
      : metrics_(metrics), method_(method), live_(live) {
    if (live_ != nullptr) live_->Add(1);
  }
  CallRecord(const CallRecord&) = delete;
  CallRecord& operator=(const CallRecord&) = delete;
  ~CallRecord() {
    if (live_ != nullptr) live_->Add(-1);
  }

  absl::Duration age() const { return Since(begin_); }
  // Counts the call and returns what to finish it with. Once.
  grpc::Status End(const absl::Status& status) {
    grpc::Status wire = ToGrpcStatus(status);
    metrics_.Request(method_, CodeName(wire.error_code()), absl::ToDoubleSeconds(age()));
    return wire;
  }

 private:
  Metrics& metrics_;
  const char* const method_;
  LiveCalls* const live_;
  const SteadyTime begin_ = SteadyNow();
};

// Infinite when the caller set none.
inline absl::Time DeadlineOf(const grpc::ServerContextBase& context) {
  const auto deadline = context.deadline();
  return deadline == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                                  : absl::FromChrono(deadline);
}

// Why gRPC cancelled a call: its deadline, or the caller went away.
inline absl::Status WhyCancelled(absl::Time deadline) {
  if (absl::Now() >= deadline) return absl::DeadlineExceededError("the call's deadline passed");
  return absl::CancelledError("the caller went away");
}

// A call that is answered at once by `handler`, which returns an absl::Status.
template <typename Handler>
grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, Metrics& metrics,
                                 const char* method, Handler&& handler) {
  CallRecord record(metrics, method);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(record.End(std::forward<Handler>(handler)()));
  return reactor;
}

}  // namespace prefilld
