// One piece of memory, handed out in parts: what batches hold while they run. Threads: any; no call
// blocks. Parts may outlive it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"

namespace prefilld {

class Arena {
 public:
  explicit Arena(Buffer memory) : state_(std::make_shared<State>(std::move(memory))) {}

  // The first hole that is large enough, or the end of the last one, until it goes.
  // RESOURCE_EXHAUSTED.
  enum class From { kBegin, kEnd };
  absl::StatusOr<Buffer> Take(size_t bytes, From from = From::kBegin);
  bool Fits(size_t bytes) const;
  size_t bytes() const { return state_->memory.bytes(); }

 private:
  static constexpr size_t kUnit = 256;  // parts begin at multiples of it
  struct State {
    explicit State(Buffer all) : memory(std::move(all)) {}
    // Where the first hole begins; memory.bytes() where there is none.
    size_t FindHole(size_t bytes) const ABSL_SHARED_LOCKS_REQUIRED(mutex);
    size_t FindLast(size_t bytes) const ABSL_SHARED_LOCKS_REQUIRED(mutex);  // likewise

    const Buffer memory;
    absl::Mutex mutex;
    std::map<size_t, size_t> taken ABSL_GUARDED_BY(mutex);  // begin -> end
  };
  const std::shared_ptr<State> state_;
};

}  // namespace prefilld
