// The KV cache of one prompt: the layers that the engine fills one after another and that pulls
// read, possibly while later layers are computed. Owns its blocks and gives them back when it is
// closed and nobody reads them any more. Its bytes lie in the blocks, or in a region that a caller
// can open; then the blocks stand for the memory that the region takes, for as long as it takes it,
// and hold none, or there are no blocks, as somebody else counts that memory. Thread-safe; nothing
// here blocks but LieIn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/tensor.h"
#include "server/job.h"
#include "server/kv/block_pool.h"
#include "server/transport/region.h"

namespace prefilld {

struct KvGeometry {
  int layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF32;
  int64_t tokens = 0;

  int64_t blocks_per_layer() const { return (tokens + kKvBlockTokens - 1) / kKvBlockTokens; }
  // Layers whose blocks a cache has at a time: all, or, where it is not retained, two in turn.
  int64_t layers_held(bool retain) const { return retain ? layers : std::min(2, layers); }
  // The longest prompt whose cache takes no more than `blocks`.
  int64_t TokensInBlocks(int64_t blocks, bool retain) const {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / kKvBlockTokens;
    return std::min(blocks / layers_held(retain), kMost) * kKvBlockTokens;
  }
  size_t tile_bytes() const {
    return static_cast<size_t>(kKvBlockTokens) * head_dim * SizeOf(dtype);
  }
  size_t block_bytes() const { return tile_bytes() * 2 * kv_heads; }
  // Bytes of K (or V) of one layer in the Hugging Face form [kv_head, token, d].
  uint64_t tensor_bytes() const {
    return static_cast<uint64_t>(kv_heads) * tokens * head_dim * SizeOf(dtype);
  }
  uint64_t total_bytes() const { return tensor_bytes() * 2 * layers; }
  // In a region: [layer][k|v], each a tensor in the Hugging Face form.
  uint64_t region_bytes() const { return RegionAligned(tensor_bytes()) * 2 * layers; }
  // The longest prompt whose region_bytes are no more than `bytes`.
  int64_t TokensInRegion(uint64_t bytes) const {
    const uint64_t tensor = bytes / (2 * static_cast<uint64_t>(layers));
    const uint64_t token = static_cast<uint64_t>(kv_heads) * head_dim * SizeOf(dtype);
    return static_cast<int64_t>(tensor / kRegionAlignment * kRegionAlignment / token);
  }
  uint64_t region_offset(int layer, bool value) const {
    return RegionAligned(tensor_bytes()) * (2 * static_cast<uint64_t>(layer) + (value ? 1 : 0));
  }
};

class KvCache : public std::enable_shared_from_this<KvCache> {
 public:
  // A readable layer: its blocks stay as they are while a pin lives (gRPC slices hold one).
  class Pin {
   public:
    ~Pin();
    int layer() const { return layer_; }
    const KvGeometry& geometry() const { return cache_->geometry(); }
    // The [128][d] tile of block b; rows beyond the prompt are unspecified, and may not be there.
    const std::byte* tile(int64_t b, int kv_head, bool value) const;
    // What the cache lies in; null: its blocks. Gone when cache and pins are.
    const Region* region() const { return region_; }

   private:
    friend class KvCache;
    Pin(std::shared_ptr<KvCache> cache, int layer, const std::vector<int32_t>* blocks,
        const Region* region)
        : cache_(std::move(cache)), layer_(layer), blocks_(blocks), region_(region) {}
    const std::shared_ptr<KvCache> cache_;
    const int layer_;
    const std::vector<int32_t>* const blocks_;
    const Region* const region_;
  };
  using Ready = std::function<void(absl::StatusOr<std::shared_ptr<const Pin>>)>;

  // One running pull. While it lives the cache is not freed, even after Close. `abort` is called
  // (any thread, at most once) when the cache is closed and the pull has made no progress for too
  // long. That, and what waits for a layer, may come while the Transfer is being destroyed, so both
  // must own what they touch.
  class Transfer {
   public:
    ~Transfer();
    const std::shared_ptr<KvCache>& cache() const { return cache_; }
    void Progress();
    // Calls `ready` once, inline or later from the thread that commits, with a pin, or with the
    // reason why this layer will never be readable. One layer at a time: it has been called, or
    // the Transfer goes first and lets go of it.
    void WhenReady(int layer, Ready ready);

   private:
    friend class KvCache;
    explicit Transfer(std::shared_ptr<KvCache> cache) : cache_(std::move(cache)) {}
    const std::shared_ptr<KvCache> cache_;
    SteadyTime progress_ = SteadyNow();  // guarded by the cache
    std::function<void()> abort_;        // guarded by the cache
    int awaited_ = 0;                    // the layer that ready_ waits for; guarded by the cache
    Ready ready_;                        // null: none; guarded by the cache
  };

  // retain: takes the blocks of every layer at once. Otherwise those of min(2, layers) layers, used
  // in turn: layer L + 2 waits until layer L is delivered. RESOURCE_EXHAUSTED as BlockPool::Take.
  static absl::StatusOr<std::shared_ptr<KvCache>> Create(BlockPool& pool,
                                                         const KvGeometry& geometry, bool retain);
  // Takes none of them yet: TakeBlocks does, before anybody computes it. For a prompt that waits.
  static std::shared_ptr<KvCache> CreateWaiting(BlockPool& pool, const KvGeometry& geometry,
                                                bool retain);
  // Runs what takes long, such as giving gigabytes back to the system, on a thread that may.
  using Later = std::function<void(std::function<void()>)>;
  // A retained cache that takes no blocks: it lies in `region`, as below, from the start.
  static std::shared_ptr<KvCache> CreateIn(std::shared_ptr<Region> region, Later later,
                                           BlockPool& pool, const KvGeometry& geometry);
  ~KvCache();

  // A retained cache, before anybody computes or reads it: from now on it lies in `region`, of
  // geometry().region_bytes() or more, and the memory of the blocks goes back to the device, which
  // may take long. `later` lets go of the region in the end; empty: whoever is last does, be it the
  // engine's thread, gRPC's or the one that commits.
  void LieIn(std::shared_ptr<Region> region, Later later = nullptr);

  // RESOURCE_EXHAUSTED as BlockPool::Take, and then it still waits.
  absl::Status TakeBlocks();
  int64_t blocks_awaited() const;  // that TakeBlocks will take
  int64_t blocks_held() const;
  BlockPool& pool() const { return pool_; }

  const KvGeometry& geometry() const { return geometry_; }
  bool retain() const { return retain_; }
  Transport transport() const;    // of the region that it lies in, or lay in; kGrpc: blocks
  RegionAddress address() const;  // of that region; empty: blocks, or freed

  // --- the engine ---
  // False: the layer's blocks still hold an undelivered one; `on_slot_free` runs when to ask again.
  bool CanCompute(int layer) const;
  void SetOnSlotFree(std::function<void()> on_slot_free);
  KvTarget Target(int layer) const;  // where its K and V are written before Commit
  void Commit(int layer);            // readable from now on; wakes those who wait for it
  void Fail(absl::Status why);       // no further layer will come; committed ones stay readable

  // --- pulls ---
  // FAILED_PRECONDITION when closed.
  absl::StatusOr<std::unique_ptr<Transfer>> Open(std::function<void()> abort);
  void Delivered(int layer);  // retain = false: frees it once its pins are gone

  // --- leases ---
  // No new pull; blocks are freed after the running ones, those of a region when no peer has it
  // open any more.
  void Close(absl::Status why);
  int running_transfers() const;
  bool computing() const;  // layers are still to come and the engine is not waiting for us
  bool complete() const;   // every layer was committed
  SteadyTime last_progress() const;        // of the computation or of any pull
  SteadyTime last_pull() const;            // progress of one, or its end
  void AbortStalled(absl::Duration idle);  // once closed: ends pulls without progress for so long

 private:
  // The blocks of one layer at a time.
  struct Slot {
    std::vector<int32_t> blocks;
    BlockState state = BlockState::kComputing;
    int pins = 0;
  };
  enum class LayerState : uint8_t { kPending, kReady, kDelivered };

  KvCache(BlockPool& pool, const KvGeometry& geometry, bool retain);
  int64_t AllBlocks() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return static_cast<int64_t>(slots_.size()) * geometry_.blocks_per_layer();
  }
  std::byte* TileAt(const std::vector<int32_t>& blocks, const Region* region, int layer, int64_t b,
                    int kv_head, bool value) const;
  const Slot& SlotOf(int layer) const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return slots_[static_cast<size_t>(layer) % slots_.size()];
  }
  Slot& SlotOf(int layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return slots_[static_cast<size_t>(layer) % slots_.size()];
  }
  bool CanComputeLocked(int layer) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  bool finished() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return committed_ == geometry_.layers || !failed_.ok();
  }
  void SetState(Slot& slot, BlockState state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::shared_ptr<const Pin> PinLocked(int layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Unpin(int layer);
  void Leave(Transfer* transfer);
  // Both return what gives back region and blocks, to be run after the lock: it may take long.
  // Never null.
  std::function<void()> Free() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::function<void()> FreeIfQuiet() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  BlockPool& pool_;
  const KvGeometry geometry_;
  const bool retain_;
  mutable absl::Mutex mutex_;
  std::shared_ptr<Region> region_ ABSL_GUARDED_BY(mutex_);  // null: in the blocks, or freed
  Transport transport_ ABSL_GUARDED_BY(mutex_) = Transport::kGrpc;
  Later later_ ABSL_GUARDED_BY(mutex_);
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
  std::vector<LayerState> layers_ ABSL_GUARDED_BY(mutex_);
  int committed_ ABSL_GUARDED_BY(mutex_) = 0;
  bool awaits_blocks_ ABSL_GUARDED_BY(mutex_) = false;
  bool freed_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failed_ ABSL_GUARDED_BY(mutex_);
  absl::Status closed_ ABSL_GUARDED_BY(mutex_);
  std::vector<Transfer*> transfers_ ABSL_GUARDED_BY(mutex_);
  std::function<void()> on_slot_free_ ABSL_GUARDED_BY(mutex_);
  SteadyTime progress_ ABSL_GUARDED_BY(mutex_) = SteadyNow();
  SteadyTime pulled_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

}  // namespace prefilld
