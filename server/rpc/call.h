// What all calls have in common: whether who calls may, is asked first; they are counted while they
// live and once at their end, their deadline is read from the call, and a message that is none is
// refused.
#pragma once

#include <grpc/support/time.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/wire/chunk.h"
#include "server/caller.h"
#include "server/clock.h"
#include "server/record/errors.h"
#include "server/record/metrics.h"
#include "server/rpc/rpcs.h"
#include "server/rpc/status.h"

namespace prefilld {

struct RpcContext;

// The calls of this server's services that live: of others, such as health's Watch, some have no
// end. Thread-safe.
class LiveCalls {
 public:
  // One that may go on for as long as its peer likes, unless it is told.
  class Endless {
   public:
    virtual ~Endless() = default;
    virtual void OnDrain() = 0;  // any thread, no lock of ours
  };

  // It is told when the server begins to drain; at once if it does already.
  void Enter(const std::shared_ptr<Endless>& call) {
    {
      absl::MutexLock lock(&mutex_);
      if (!draining_) {
        endless_.emplace(call.get(), call);
        return;
      }
    }
    call->OnDrain();
  }
  void Leave(const Endless* call) {
    absl::MutexLock lock(&mutex_);
    endless_.erase(call);
  }
  void Drain() {
    std::map<const Endless*, std::weak_ptr<Endless>> endless;
    {
      absl::MutexLock lock(&mutex_);
      draining_ = true;
      endless.swap(endless_);
    }
    for (const auto& [key, weak] : endless) {
      if (const auto call = weak.lock()) call->OnDrain();
    }
  }

  void Add(int more) {
    absl::MutexLock lock(&mutex_);
    count_ += more;
    changed_.SignalAll();
  }
  // Blocks until none lives, or the deadline: false.
  bool WaitNone(SteadyTime deadline) const {
    absl::MutexLock lock(&mutex_);
    const auto none = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return count_ == 0; };
    return changed_.AwaitUntil(deadline, mutex_, none);
  }

 private:
  mutable absl::Mutex mutex_;
  SteadyCondition changed_;
  int64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<const Endless*, std::weak_ptr<Endless>> endless_ ABSL_GUARDED_BY(mutex_);
};

// One call from its arrival to its end. Not thread-safe.
class CallRecord {
 public:
  // The call is counted in as long as its record lives.
  CallRecord(RpcContext& rpc, const grpc::CallbackServerContext& context, Rpc which);
  CallRecord(const CallRecord&) = delete;
  CallRecord& operator=(const CallRecord&) = delete;
  ~CallRecord() { live_.Add(-1); }

  // Who calls, or why it may not: then nothing of the call is looked at, and its refusal has its
  // line in the log.
  const absl::StatusOr<Caller>& caller() const { return caller_; }

  absl::Duration age() const { return Since(begin_); }
  // Counts the call and returns what to finish it with. Once.
  grpc::Status End(const absl::Status& status) {
    grpc::Status wire = ToGrpcStatus(status);
    metrics_.Request(NameOf(rpc_), CodeName(wire.error_code()), absl::ToDoubleSeconds(age()));
    return wire;
  }

 private:
  Metrics& metrics_;
  LiveCalls& live_;
  const Rpc rpc_;
  const SteadyTime begin_ = SteadyNow();
  const absl::StatusOr<Caller> caller_;
};

// Infinite when the caller set none.
inline SteadyTime DeadlineOf(const grpc::ServerContextBase& context) {
  const gpr_timespec deadline = context.raw_deadline();
  if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) {
    return absl::InfiniteFuture();
  }
  const gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
  return SteadyNow() + absl::Seconds(left.tv_sec) + absl::Nanoseconds(left.tv_nsec);
}

// In so long, as gRPC takes it.
inline gpr_timespec GrpcTimeIn(absl::Duration duration) {
  return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                      gpr_time_from_nanos(absl::ToInt64Nanoseconds(duration), GPR_TIMESPAN));
}

// Why gRPC cancelled a call: its deadline, or the caller went away.
inline absl::Status WhyCancelled(SteadyTime deadline) {
  if (SteadyNow() >= deadline) return absl::DeadlineExceededError("the call's deadline passed");
  return absl::CancelledError("the caller went away");
}

// gRPC itself would call bytes that are no such message UNIMPLEMENTED, without a word, uncounted:
// so it hands on the bytes.
template <typename Message>
absl::Status Parse(grpc::ByteBuffer bytes, Message* message) {
  if (ParseMessage(&bytes, message)) return absl::OkStatus();
  return InvalidField("request", absl::StrCat("the message is no ", Message::descriptor()->name()));
}

// A call that is answered at once by `handler`, which takes a Request, the Caller and a Response to
// fill, and returns an absl::Status.
template <typename Request, typename Response, typename Handler>
grpc::ServerUnaryReactor* Answer(RpcContext& rpc, const grpc::CallbackServerContext& context,
                                 Rpc which, const grpc::ByteBuffer& request,
                                 grpc::ByteBuffer* response, Handler&& handler) {
  struct Reactor final : grpc::ServerUnaryReactor {
    Reactor(RpcContext& rpc, const grpc::CallbackServerContext& context, Rpc which)
        : record(rpc, context, which) {}
    void OnDone() override { delete this; }
    CallRecord record;
  };
  auto* reactor = new Reactor(rpc, context, which);
  Request asked;
  absl::Status status = reactor->record.caller().status();
  if (status.ok()) status = Parse(request, &asked);
  if (status.ok()) {
    Response answer;
    status = std::forward<Handler>(handler)(asked, *reactor->record.caller(), &answer);
    if (status.ok()) *response = EncodeMessage(answer);
  }
  reactor->Finish(reactor->record.End(status));
  return reactor;
}

}  // namespace prefilld
