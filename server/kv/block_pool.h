// The memory of every KV cache: one arena of equal blocks, taken at start, in host memory, where
// pulls read it: pinned, where the device computes elsewhere. A KV block holds the K
// and V of 128 tokens of one layer, [kv_head][k|v][128][d]; models with smaller blocks waste the
// rest. Thread-safe; never blocks longer than a list operation.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "server/clock.h"

namespace prefilld {

inline constexpr int kKvBlockTokens = 128;

// Where a block is between free and free: reserved blocks of a job that waits or computes are
// kComputing, readable ones kLeased, and kTransferring while at least one pull reads them.
enum class BlockState { kFree, kComputing, kLeased, kTransferring };
inline constexpr std::array<const char*, 4> kBlockStateNames = {"free", "computing", "leased",
                                                                "transferring"};

class BlockPool {
 public:
  // RESOURCE_EXHAUSTED when there are no `bytes` to be had, INVALID_ARGUMENT when they hold no
  // block.
  static absl::StatusOr<std::unique_ptr<BlockPool>> Create(Device& device, size_t bytes,
                                                           size_t block_bytes);

  size_t block_bytes() const { return block_bytes_; }
  int64_t total() const { return total_; }

  // Takes `count` blocks, all or none, into kComputing. RESOURCE_EXHAUSTED (reason kv_memory)
  // names what is free; when the pool could never hold `count`, it carries no retry.
  absl::StatusOr<std::vector<int32_t>> Take(int64_t count);
  void GiveBack(const std::vector<int32_t>& blocks, BlockState from);
  // Called whenever blocks have come back, on whichever thread gives them; must not block.
  void SetOnGiveBack(std::function<void()> on_give_back);
  int64_t free() const;
  void Move(int64_t count, BlockState from, BlockState to);
  // Taken blocks that nobody will read or write before they are given back: their memory goes back
  // to the system, but where it is pinned.
  void Discard(std::vector<int32_t> blocks);

  std::byte* data(int32_t block) const {
    return arena_.as<std::byte>() + static_cast<size_t>(block) * block_bytes_;
  }
  std::array<int64_t, 4> CountByState() const;
  // Blocks until every block is free, or the deadline: false.
  bool WaitAllFree(SteadyTime deadline) const;

 private:
  BlockPool(Device& device, Buffer arena, size_t block_bytes, int64_t total);

  Device& device_;
  const Buffer arena_;
  const size_t block_bytes_;
  const int64_t total_;
  mutable absl::Mutex mutex_;
  SteadyCondition given_back_;
  std::vector<int32_t> free_ ABSL_GUARDED_BY(mutex_);
  std::function<void()> on_give_back_ ABSL_GUARDED_BY(mutex_);
  std::array<int64_t, 4> counts_ ABSL_GUARDED_BY(mutex_){};
};

}  // namespace prefilld
