// What models hold of the device while they are served, known and taken at start: no prompt's
// layers ask for memory while they are computed. A plan is a function of the models, the longest
// prompt, the scheduler's bounds and what is free.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "server/kv/kv_cache.h"
#include "server/model/transformer.h"

namespace prefilld {

// Of a prompt's cache.
KvGeometry GeometryOf(const ModelInfo& info, int64_t tokens);

// What one layer of a batch needs beside weights and tiles, and what its batch holds.
enum class Holding {
  kActivations,
  kShortActivations,
  kCounts,
  kIndex,
  kWorkspace,
  kKvOut,
  kReports,
  kBatch
};
inline constexpr size_t kHeldCount = 8;
using HeldBytes = std::array<size_t, kHeldCount>;
inline size_t& Of(HeldBytes& bytes, Holding held) { return bytes[static_cast<size_t>(held)]; }
inline size_t Of(const HeldBytes& bytes, Holding held) { return bytes[static_cast<size_t>(held)]; }
bool OnHost(Holding held);  // be the device's memory its own

// Of prompts of these lengths in one batch; and of attention alone, which is counts, index and
// workspace. Nothing of what the backend does not support. Pure; threads: any.
HeldBytes HeldBy(Backend& backend, const Transformer& model, const std::vector<int64_t>& lengths,
                 const SparsityPolicy& policy);
HeldBytes HeldBy(Backend& backend, const AttentionShape& shape, const SparsityPolicy& policy);

struct PlanInputs {
  Backend& backend;
  std::vector<const Transformer*> models;
  int64_t prompt_tokens = 0;  // the longest prompt
  // The scheduler's: tokens and jobs of a batch of short prompts, and batches that run in turn.
  int64_t batch_tokens = 0;
  int batch_jobs = 0, batches = 0;
  uint64_t attend_bytes = 0;
  uint64_t kv_block_bytes = 0, kv_segment_bytes = 0;  // of all blocks, and of the pool of segments
  uint64_t kv_device_bytes = 0;                       // of the pool in the device's memory
  std::optional<uint64_t> free;                       // of the device, where that is known
};

struct MemoryPlan {
  enum class When { kMapped, kLoaded, kStart, kLater };
  struct Row {
    std::string what;
    std::string of;  // the model, or empty
    bool device = false;
    When when = When::kStart;
    uint64_t bytes = 0;
    std::string by;  // what it is determined by
  };

  int64_t prompt_tokens = 0;  // the longest prompt
  int64_t fits = 0;           // the longest for which the device has memory, 0: none; at most that
  HeldBytes held{};           // of the largest batch
  size_t batches = 0;         // of all batches that run, instead of held's
  std::optional<uint64_t> free;  // of the device, before it is taken, where that is known
  uint64_t spare = 0;            // and after it, for shapes that nobody planned; see PlanMemory
  std::vector<Row> rows;

  // Of the device, from now on.
  uint64_t needs() const;
};
inline constexpr const char* kWhenNames[] = {"mapped", "loaded", "start", "as calls come"};
constexpr const char* Name(MemoryPlan::When when) { return kWhenNames[static_cast<int>(when)]; }

// Where it does not fit (needs() > free), it says what would be needed, and nothing is spare. Where
// nothing is known of what is free, everything fits. Without models it is what Attends need. On a
// CPU nothing is taken: files are mapped, and pages come at first touch. A plan of `fits` tokens,
// of the same inputs, fits.
MemoryPlan PlanMemory(const PlanInputs& inputs);

// kv_device_bytes where nobody says: a quarter of what a plan without them leaves spare, at most
// 8 GiB.
uint64_t KvDeviceBytes(const MemoryPlan& plan);

}  // namespace prefilld
