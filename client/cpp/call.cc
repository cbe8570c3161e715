#include "client/cpp/call.h"

#include <grpc/support/time.h>

#include <algorithm>
#include <random>

#include "client/cpp/errors.h"

namespace prefilld::client {

void Cancellation::Cancel() {
  std::lock_guard lock(mutex_);
  cancelled_ = true;
  signal_.notify_all();
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
}

bool Cancellation::cancelled() const {
  std::lock_guard lock(mutex_);
  return cancelled_;
}

bool Cancellation::WaitFor(absl::Duration duration) {
  std::unique_lock lock(mutex_);
  const absl::Duration most = std::min(duration, absl::Hours(24));  // what the clock can add
  return signal_.wait_for(lock, absl::ToChronoNanoseconds(most), [this] { return cancelled_; });
}

Cancellation::Scope::Scope(Cancellation& cancellation, grpc::ClientContext& context)
    : cancellation_(cancellation), context_(context) {
  std::lock_guard lock(cancellation_.mutex_);
  cancellation_.contexts_.insert(&context_);
  // A context that is cancelled before its call starts cancels the call as it starts.
  if (cancellation_.cancelled_) context_.TryCancel();
}

Cancellation::Scope::~Scope() {
  std::lock_guard lock(cancellation_.mutex_);
  cancellation_.contexts_.erase(&context_);
}

bool IsRetryable(const absl::Status& status) {
  return absl::IsUnavailable(status) ||
         (absl::IsResourceExhausted(status) && RetryDelay(status).has_value());
}

absl::Status RunWithRetries(const CallOptions& options,
                            absl::FunctionRef<absl::Status(Try&)> attempt) {
  Cancellation never;
  Cancellation& cancellation = options.cancellation != nullptr ? *options.cancellation : never;
  const absl::Time deadline = SteadyNow() + options.timeout;
  const gpr_timespec until =
      deadline == absl::InfiniteFuture()
          ? gpr_inf_future(GPR_CLOCK_MONOTONIC)
          : gpr_time_add(
                gpr_now(GPR_CLOCK_MONOTONIC),
                gpr_time_from_nanos(absl::ToInt64Nanoseconds(options.timeout), GPR_TIMESPAN));
  std::minstd_rand rng(std::random_device{}());
  absl::Duration backoff = options.retry.first_delay;
  int tries = 0;
  // gRPC rounds deadlines up and may let a call through that is already too late.
  if (deadline <= SteadyNow()) return absl::DeadlineExceededError("the deadline is already past");
  while (true) {
    Try current;
    current.context.set_deadline(until);
    absl::Status status;
    {
      Cancellation::Scope scope(cancellation, current.context);
      status = attempt(current);
    }
    if (status.ok() || !IsRetryable(status)) return status;

    if (current.progressed) {
      tries = 0;
      backoff = options.retry.first_delay;
    }
    if (++tries >= options.retry.tries_max) return status;
    // Jitter keeps clients that failed together from coming back together.
    const double jitter = std::uniform_real_distribution<>(0.5, 1.0)(rng);
    absl::Duration delay = backoff * jitter;
    delay = std::max(delay, RetryDelay(status).value_or(absl::ZeroDuration()) * (jitter + 0.5));
    if (SteadyNow() + delay >= deadline) return status;
    if (cancellation.WaitFor(delay)) return absl::CancelledError("cancelled between two tries");
    backoff = std::min(2 * backoff, options.retry.delay_max);
  }
}

}  // namespace prefilld::client
