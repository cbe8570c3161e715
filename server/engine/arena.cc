#include "server/engine/arena.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld {

size_t Arena::State::FindHole(size_t bytes) const {
  size_t begin = 0;
  for (const auto& [from, end] : taken) {
    if (from - begin >= bytes) return begin;
    begin = (end + kUnit - 1) / kUnit * kUnit;
  }
  return begin + bytes <= memory.bytes() ? begin : memory.bytes();
}

absl::StatusOr<Buffer> Arena::Take(size_t bytes) {
  absl::MutexLock lock(&state_->mutex);
  const size_t begin = state_->FindHole(bytes);
  if (begin == state_->memory.bytes()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", bytes, " bytes in one piece of ", state_->memory.bytes()));
  }
  state_->taken.emplace(begin, begin + bytes);
  return Buffer(state_->memory.as<char>() + begin, bytes, [state = state_, begin](void*, size_t) {
    absl::MutexLock give(&state->mutex);
    state->taken.erase(begin);
  });
}

bool Arena::Fits(size_t bytes) const {
  absl::MutexLock lock(&state_->mutex);
  return state_->FindHole(bytes) < state_->memory.bytes();
}

}  // namespace prefilld
