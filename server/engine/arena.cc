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

size_t Arena::State::FindLast(size_t bytes) const {
  size_t end = memory.bytes();
  for (auto it = taken.rbegin();; ++it) {
    const size_t hole = it == taken.rend() ? 0 : (it->second + kUnit - 1) / kUnit * kUnit;
    if (end >= hole && end - hole >= bytes) {
      const size_t begin = (end - bytes) / kUnit * kUnit;
      if (begin >= hole) return begin;
    }
    if (it == taken.rend()) return memory.bytes();
    end = it->first;
  }
}

absl::StatusOr<Buffer> Arena::Take(size_t bytes, From from) {
  absl::MutexLock lock(&state_->mutex);
  size_t begin = from == From::kEnd ? state_->FindLast(bytes) : state_->memory.bytes();
  if (begin == state_->memory.bytes()) begin = state_->FindHole(bytes);
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
