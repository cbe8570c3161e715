#include "server/engine/completion_queue.h"

#include <utility>

namespace prefilld {

CompletionQueue::CompletionQueue(size_t tickets_max)
    : tickets_max_(tickets_max), thread_([this] { Loop(); }) {}

CompletionQueue::~CompletionQueue() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
  }
  thread_.join();
}

void CompletionQueue::Post(std::unique_ptr<Device::Mark> mark, Completion then) {
  absl::MutexLock lock(&mutex_);
  const auto room = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return posted_ - done_ < tickets_max_;
  };
  mutex_.Await(absl::Condition(&room));
  tickets_.push_back({std::move(mark), std::move(then)});
  ++posted_;
}

void CompletionQueue::Flush() {
  absl::MutexLock lock(&mutex_);
  const auto run = [this, last = posted_]()
                       ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return done_ >= last; };
  mutex_.Await(absl::Condition(&run));
}

void CompletionQueue::Loop() {
  for (;;) {
    Ticket ticket;
    {
      absl::MutexLock lock(&mutex_);
      const auto wanted = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
        return stop_ || !tickets_.empty();
      };
      mutex_.Await(absl::Condition(&wanted));
      if (tickets_.empty()) return;
      ticket = std::move(tickets_.front());
      tickets_.pop_front();
    }
    ticket.then(ticket.mark ? ticket.mark->Await() : absl::OkStatus());
    ticket = Ticket();  // what it owned goes before it counts as done
    absl::MutexLock lock(&mutex_);
    ++done_;
  }
}

}  // namespace prefilld
