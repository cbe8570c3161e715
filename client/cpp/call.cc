#include "client/cpp/call.h"

#include <algorithm>
#include <random>

#include "client/cpp/errors.h"

namespace prefilld::client {

void Cancellation::Cancel() {
  absl::MutexLock lock(&mutex_);
  cancelled_ = true;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
}

bool Cancellation::cancelled() const {
  absl::MutexLock lock(&mutex_);
  return cancelled_;
}

bool Cancellation::WaitFor(absl::Duration duration) {
  absl::MutexLock lock(&mutex_);
  return mutex_.AwaitWithTimeout(absl::Condition(&cancelled_), duration);
}

Cancellation::Scope::Scope(Cancellation& cancellation, grpc::ClientContext& context)
    : cancellation_(cancellation), context_(context) {
  absl::MutexLock lock(&cancellation_.mutex_);
  cancellation_.contexts_.insert(&context_);
  // A context that is cancelled before its call starts cancels the call as it starts.
  if (cancellation_.cancelled_) context_.TryCancel();
}

Cancellation::Scope::~Scope() {
  absl::MutexLock lock(&cancellation_.mutex_);
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
  const absl::Time deadline = absl::Now() + options.timeout;
  std::minstd_rand rng(std::random_device{}());
  absl::Duration backoff = options.retry.first_delay;
  int tries = 0;
  // gRPC rounds deadlines up and may let a call through that is already too late.
  if (deadline <= absl::Now()) return absl::DeadlineExceededError("the deadline is already past");
  while (true) {
    Try current;
    current.context.set_deadline(absl::ToChronoTime(deadline));
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
    absl::Duration delay = backoff * std::uniform_real_distribution<>(0.5, 1.0)(rng);
    delay = std::max(delay, RetryDelay(status).value_or(absl::ZeroDuration()));
    if (absl::Now() + delay >= deadline) return status;
    if (cancellation.WaitFor(delay)) return absl::CancelledError("cancelled between two tries");
    backoff = std::min(2 * backoff, options.retry.delay_max);
  }
}

}  // namespace prefilld::client
