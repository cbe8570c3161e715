#include "server/kv/kv_cache.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld {

KvCache::Pin::~Pin() { cache_->Unpin(layer_); }

const std::byte* KvCache::Pin::tile(int64_t b, int kv_head, bool value) const {
  return cache_->TileAt(*blocks_, region_, layer_, b, kv_head, value);
}

KvCache::Transfer::~Transfer() { cache_->Leave(this); }

void KvCache::Transfer::Progress() {
  absl::MutexLock lock(&cache_->mutex_);
  progress_ = cache_->progress_ = cache_->pulled_ = SteadyNow();
}

absl::StatusOr<std::shared_ptr<KvCache>> KvCache::Create(BlockPool& pool,
                                                         const KvGeometry& geometry, bool retain) {
  auto cache = CreateWaiting(pool, geometry, retain);
  if (absl::Status status = cache->TakeBlocks(); !status.ok()) return status;
  return cache;
}

std::shared_ptr<KvCache> KvCache::CreateWaiting(BlockPool& pool, const KvGeometry& geometry,
                                                bool retain) {
  std::shared_ptr<KvCache> cache(new KvCache(pool, geometry, retain));
  absl::MutexLock lock(&cache->mutex_);
  cache->awaits_blocks_ = true;
  return cache;
}

std::shared_ptr<KvCache> KvCache::CreateIn(std::shared_ptr<Region> region, Later later,
                                           BlockPool& pool, const KvGeometry& geometry) {
  std::shared_ptr<KvCache> cache(new KvCache(pool, geometry, /*retain=*/true));
  cache->LieIn(std::move(region), std::move(later));
  return cache;
}

KvCache::KvCache(BlockPool& pool, const KvGeometry& geometry, bool retain)
    : pool_(pool),
      geometry_(geometry),
      retain_(retain),
      slots_(static_cast<size_t>(geometry.layers_held(retain))),
      layers_(geometry.layers, LayerState::kPending) {}

absl::Status KvCache::TakeBlocks() {
  absl::MutexLock lock(&mutex_);
  if (!awaits_blocks_) return absl::OkStatus();
  auto blocks = pool_.Take(AllBlocks());
  if (!blocks.ok()) return blocks.status();
  awaits_blocks_ = false;
  const int64_t per_slot = geometry_.blocks_per_layer();
  auto begin = blocks->begin();
  for (Slot& slot : slots_) {
    slot.blocks.assign(begin, begin + per_slot);
    begin += per_slot;
  }
  return absl::OkStatus();
}

int64_t KvCache::blocks_awaited() const {
  absl::MutexLock lock(&mutex_);
  return awaits_blocks_ ? AllBlocks() : 0;
}

int64_t KvCache::blocks_held() const {
  absl::MutexLock lock(&mutex_);
  return freed_ || slots_[0].blocks.empty() ? 0 : AllBlocks();
}

void KvCache::LieIn(std::shared_ptr<Region> region, Later later) {
  std::vector<int32_t> blocks;
  {
    absl::MutexLock lock(&mutex_);
    region_ = std::move(region);
    transport_ = region_->transport();
    later_ = std::move(later);
    for (const Slot& slot : slots_) {
      blocks.insert(blocks.end(), slot.blocks.begin(), slot.blocks.end());
    }
  }
  pool_.Discard(std::move(blocks));
}

RegionAddress KvCache::address() const {
  absl::MutexLock lock(&mutex_);
  return region_ != nullptr ? region_->address() : RegionAddress();
}

Transport KvCache::transport() const {
  absl::MutexLock lock(&mutex_);
  return transport_;
}

// Pins and transfers hold the cache, so nobody reads any more.
KvCache::~KvCache() {
  std::function<void()> give_back = [] {};
  {
    absl::MutexLock lock(&mutex_);
    if (!freed_) give_back = Free();
  }
  give_back();
}

// The region first: the blocks are free for others only when its memory is, which may be later,
// where peers have it open.
std::function<void()> KvCache::Free() {
  freed_ = true;
  std::vector<std::pair<std::vector<int32_t>, BlockState>> taken;
  for (Slot& slot : slots_) {
    if (!slot.blocks.empty()) taken.emplace_back(slot.blocks, slot.state);
  }
  Later later = region_ ? std::exchange(later_, nullptr) : nullptr;
  const bool counted = !taken.empty();
  std::shared_ptr<void> blocks(nullptr, [&pool = pool_, taken = std::move(taken)](void*) {
    for (const auto& [numbers, state] : taken) pool.GiveBack(numbers, state);
  });
  if (region_ && counted) region_->Keep(blocks);
  auto give_back = [region = std::move(region_), blocks = std::move(blocks)]() mutable {
    region.reset();
    blocks.reset();
  };
  if (!later) return give_back;
  return [later = std::move(later), give_back = std::move(give_back)]() mutable {
    later(std::move(give_back));  // no share of the region stays here
  };
}

std::byte* KvCache::TileAt(const std::vector<int32_t>& blocks, const Region* region, int layer,
                           int64_t b, int kv_head, bool value) const {
  if (region == nullptr) {
    return pool_.data(blocks[b]) + geometry_.tile_bytes() * (2 * kv_head + (value ? 1 : 0));
  }
  return region->data() + geometry_.region_offset(layer, value) +
         geometry_.tensor_bytes() / geometry_.kv_heads * kv_head + geometry_.tile_bytes() * b;
}

bool KvCache::CanComputeLocked(int layer) const {
  const int slots = static_cast<int>(slots_.size());
  if (layer < slots) return true;
  return layers_[layer - slots] == LayerState::kDelivered && SlotOf(layer).pins == 0;
}

bool KvCache::CanCompute(int layer) const {
  absl::MutexLock lock(&mutex_);
  return CanComputeLocked(layer);
}

void KvCache::SetOnSlotFree(std::function<void()> on_slot_free) {
  absl::MutexLock lock(&mutex_);
  on_slot_free_ = std::move(on_slot_free);
}

KvTarget KvCache::Target(int layer) const {
  absl::MutexLock lock(&mutex_);
  const int64_t d = geometry_.head_dim, size = static_cast<int64_t>(SizeOf(geometry_.dtype));
  if (region_ != nullptr) {
    const auto begin = geometry_.region_offset(layer, /*value=*/false);
    const auto value = static_cast<int64_t>(geometry_.region_offset(layer, true) - begin);
    return {.pages = {region_->data() + begin},
            .page_tokens = geometry_.tokens,
            .head_stride = geometry_.tokens * d,
            .value_stride = value / size,
            .dtype = geometry_.dtype};
  }
  KvTarget target{.pages = {},
                  .page_tokens = kKvBlockTokens,
                  .head_stride = 2 * kKvBlockTokens * d,
                  .value_stride = kKvBlockTokens * d,
                  .dtype = geometry_.dtype};
  for (const int32_t block : SlotOf(layer).blocks) target.pages.push_back(pool_.data(block));
  return target;
}

void KvCache::SetState(Slot& slot, BlockState state) {
  pool_.Move(static_cast<int64_t>(slot.blocks.size()), slot.state, state);
  slot.state = state;
}

std::shared_ptr<const KvCache::Pin> KvCache::PinLocked(int layer) {
  Slot& slot = SlotOf(layer);
  if (slot.pins++ == 0) SetState(slot, BlockState::kTransferring);
  return std::shared_ptr<const Pin>(
      new Pin(shared_from_this(), layer, &slot.blocks, region_.get()));
}

void KvCache::Commit(int layer) {
  std::vector<std::pair<Ready, std::shared_ptr<const Pin>>> wake;
  std::function<void()> give_back;
  {
    absl::MutexLock lock(&mutex_);
    layers_[layer] = LayerState::kReady;
    ++committed_;
    progress_ = SteadyNow();
    SetState(SlotOf(layer), BlockState::kLeased);
    for (Transfer* transfer : transfers_) {
      if (!transfer->ready_ || transfer->awaited_ != layer) continue;
      wake.emplace_back(std::exchange(transfer->ready_, nullptr), PinLocked(layer));
    }
    give_back = FreeIfQuiet();
  }
  give_back();
  for (auto& [ready, pin] : wake) ready(std::move(pin));
}

void KvCache::Fail(absl::Status why) {
  std::vector<Ready> wake;
  std::function<void()> give_back;
  {
    absl::MutexLock lock(&mutex_);
    if (finished()) return;
    failed_ = why;
    for (Transfer* transfer : transfers_) {
      if (transfer->ready_) wake.push_back(std::exchange(transfer->ready_, nullptr));
    }
    give_back = FreeIfQuiet();
  }
  give_back();
  for (const Ready& ready : wake) ready(why);
}

absl::StatusOr<std::unique_ptr<KvCache::Transfer>> KvCache::Open(std::function<void()> abort) {
  absl::MutexLock lock(&mutex_);
  if (!closed_.ok()) return closed_;
  std::unique_ptr<Transfer> transfer(new Transfer(shared_from_this()));
  transfer->abort_ = std::move(abort);
  transfers_.push_back(transfer.get());
  progress_ = pulled_ = SteadyNow();
  return transfer;
}

void KvCache::Transfer::WhenReady(int layer, Ready ready) {
  absl::StatusOr<std::shared_ptr<const Pin>> now = absl::InternalError("");
  {
    absl::MutexLock lock(&cache_->mutex_);
    if (cache_->layers_[layer] == LayerState::kReady) {
      now = cache_->PinLocked(layer);
    } else if (cache_->layers_[layer] == LayerState::kDelivered) {
      now = absl::FailedPreconditionError(
          absl::StrCat("layer ", layer, " was delivered and freed (retain = false)"));
    } else if (!cache_->failed_.ok()) {
      now = cache_->failed_;
    } else {
      awaited_ = layer;
      ready_ = std::move(ready);
      return;
    }
  }
  ready(std::move(now));
}

void KvCache::Delivered(int layer) {
  std::function<void()> on_slot_free;
  {
    absl::MutexLock lock(&mutex_);
    if (retain_ || layers_[layer] != LayerState::kReady) return;
    layers_[layer] = LayerState::kDelivered;
    progress_ = SteadyNow();
    if (SlotOf(layer).pins > 0) return;  // Unpin goes on from here
    SetState(SlotOf(layer), BlockState::kComputing);
    on_slot_free = on_slot_free_;
  }
  if (on_slot_free) on_slot_free();
}

void KvCache::Unpin(int layer) {
  std::function<void()> on_slot_free, give_back;
  {
    absl::MutexLock lock(&mutex_);
    Slot& slot = SlotOf(layer);
    if (--slot.pins > 0) return;
    if (layers_[layer] == LayerState::kDelivered) {
      SetState(slot, BlockState::kComputing);
      on_slot_free = on_slot_free_;
    } else {
      SetState(slot, BlockState::kLeased);
    }
    give_back = FreeIfQuiet();
  }
  give_back();
  if (on_slot_free) on_slot_free();
}

void KvCache::Leave(Transfer* transfer) {
  std::function<void()> give_back;
  {
    absl::MutexLock lock(&mutex_);
    transfers_.erase(std::find(transfers_.begin(), transfers_.end(), transfer));
    pulled_ = SteadyNow();
    give_back = FreeIfQuiet();
  }
  give_back();
}

void KvCache::Close(absl::Status why) {
  std::function<void()> give_back;
  {
    absl::MutexLock lock(&mutex_);
    if (closed_.ok()) closed_ = std::move(why);
    // A slow reader has its whole time from here, even if slowness is what ended the lease.
    for (Transfer* transfer : transfers_) transfer->progress_ = SteadyNow();
    give_back = FreeIfQuiet();
  }
  give_back();
}

// The engine may still write into the blocks until it has committed the last layer or failed.
std::function<void()> KvCache::FreeIfQuiet() {
  bool quiet = !freed_ && !closed_.ok() && finished() && transfers_.empty();
  for (const Slot& slot : slots_) quiet &= slot.pins == 0;
  if (!quiet) return [] {};
  return Free();
}

int KvCache::running_transfers() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int>(transfers_.size());
}

bool KvCache::computing() const {
  absl::MutexLock lock(&mutex_);
  return !finished() && CanComputeLocked(committed_);
}

bool KvCache::complete() const {
  absl::MutexLock lock(&mutex_);
  return committed_ == geometry_.layers;
}

SteadyTime KvCache::last_progress() const {
  absl::MutexLock lock(&mutex_);
  return progress_;
}

SteadyTime KvCache::last_pull() const {
  absl::MutexLock lock(&mutex_);
  return pulled_;
}

void KvCache::AbortStalled(absl::Duration idle) {
  std::vector<std::function<void()>> aborts;
  {
    absl::MutexLock lock(&mutex_);
    if (closed_.ok()) return;
    for (Transfer* transfer : transfers_) {
      if (transfer->abort_ && Since(transfer->progress_) >= idle) {
        aborts.push_back(std::exchange(transfer->abort_, nullptr));
      }
    }
  }
  for (auto& abort : aborts) abort();
}

}  // namespace prefilld
