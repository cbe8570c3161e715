// How long a prompt may be: no longer than its model's positions, than what one cache may have of
// --kv_memory, and than what the device has memory for. Pure; threads: any.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/engine/memory_plan.h"
#include "server/model/transformer.h"

namespace prefilld {

using ModelInfos = std::vector<const ModelInfo*>;

// How --kv_memory is shared out; one cache lies in the one or in the other.
struct KvShares {
  uint64_t block_bytes = 0;  // of the model whose blocks are the largest
  int64_t blocks = std::numeric_limits<int64_t>::max();
  // Of a pool of segments, for caches over posix_shm; none: there is no pool, and they take blocks.
  std::optional<uint64_t> segment_bytes;
};
// bytes: --kv_memory. pooled: there is a pool of segments.
KvShares ShareKv(const ModelInfos& models, uint64_t bytes, bool pooled);
// The least --kv_memory of which, shared out so, one cache of each of these models holds so many
// tokens, or its positions. retain: all layers of it, not those that pass through.
uint64_t KvMemoryFor(const ModelInfos& models, int64_t tokens, const KvShares& shares,
                     bool retain = true);

// Bytes as flags take them, rounded up: "1536KiB", "32GiB".
std::string FlagSize(uint64_t bytes);

struct PromptLimitInputs {
  int64_t asked = 0;       // tokens of the longest prompt
  ModelInfos models;       // one at least
  KvShares kv;             // of all models
  bool retain = true;      // of prompts whose whole cache is kept
  const MemoryPlan& plan;  // of `asked`, or more
};
// What keeps prompts from being longer than `tokens`, and the flags that would help, if any.
struct PromptBound {
  int64_t tokens;
  std::string what;  // model | kv_memory | gpu memory
  std::string why, help;
};
// All that bind.
std::vector<PromptBound> BoundsOf(const PromptLimitInputs& inputs);
// RESOURCE_EXHAUSTED where prompts of `asked` tokens cannot be served, of every model that has such
// positions: in one line what limits them, the largest number that can, and the flags that help.
absl::Status CheckPromptTokens(const PromptLimitInputs& inputs);

}  // namespace prefilld
