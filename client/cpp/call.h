// What every call of the client has in common: a deadline, retries, and a way to stop it from
// another thread.
#pragma once

#include <grpcpp/client_context.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace prefilld::client {

// Since the machine's start: what durations are taken by, for nobody sets that clock.
inline absl::Time SteadyNow() {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

// Stops calls. One object may serve any number of calls, on any threads; it outlives them. Once
// cancelled it stays so: later calls with it end at once.
class Cancellation {
 public:
  Cancellation() = default;
  Cancellation(const Cancellation&) = delete;
  Cancellation& operator=(const Cancellation&) = delete;

  // Ends every running call with CANCELLED. Does not block, and is not for signal handlers.
  void Cancel();
  bool cancelled() const;

  // Blocks for `duration`, or until Cancel: true then.
  bool WaitFor(absl::Duration duration);

  // Cancel reaches `context` while this lives.
  class Scope {
   public:
    Scope(Cancellation& cancellation, grpc::ClientContext& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Cancellation& cancellation_;
    grpc::ClientContext& context_;
  };

 private:
  // Of the standard library's, which waits by the steady clock. Guards what follows.
  mutable std::mutex mutex_;
  std::condition_variable signal_;
  bool cancelled_ = false;
  std::set<grpc::ClientContext*> contexts_;
};

struct RetryPolicy {
  int tries_max = 5;                                     // in a row without progress; 1: no retry
  absl::Duration first_delay = absl::Milliseconds(100);  // doubles with every try
  absl::Duration delay_max = absl::Seconds(5);           // unless the server asks for more
};

struct CallOptions {
  absl::Duration timeout = absl::InfiniteDuration();  // of the whole call, retries included
  RetryPolicy retry;
  Cancellation* cancellation = nullptr;  // borrowed for the call; null: cannot be cancelled
};

// One try of a call.
struct Try {
  grpc::ClientContext context;  // deadline set, reached by the call's cancellation
  bool progressed = false;  // set where the next try goes on from here: the tries are counted anew
};

// UNAVAILABLE, and RESOURCE_EXHAUSTED that carries RetryInfo.
bool IsRetryable(const absl::Status& status);

// Runs `attempt` until it returns OK or a status that another try cannot help, the tries are used
// up, or the next try would start after the deadline; returns the last status. Between tries it
// waits with exponential back-off and jitter, and at least as long as the server's RetryInfo asks.
// Blocks. Several tries are one request to the server as long as they carry one request_id.
absl::Status RunWithRetries(const CallOptions& options,
                            absl::FunctionRef<absl::Status(Try&)> attempt);

}  // namespace prefilld::client
