#include "server/kv/kv_cache.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld {

KvCache::Pin::~Pin() { cache_->Unpin(layer_); }

const std::byte* KvCache::Pin::tile(int64_t b, int kv_head, bool value) const {
  return cache_->pool_.data((*blocks_)[b]) +
         geometry().tile_bytes() * (2 * kv_head + (value ? 1 : 0));
}

KvCache::Transfer::~Transfer() { cache_->Leave(this); }

void KvCache::Transfer::Progress() {
  absl::MutexLock lock(&cache_->mutex_);
  progress_ = cache_->progress_ = absl::Now();
}

absl::StatusOr<std::shared_ptr<KvCache>> KvCache::Create(BlockPool& pool,
                                                         const KvGeometry& geometry, bool retain) {
  std::shared_ptr<KvCache> cache(new KvCache(pool, geometry, retain));
  absl::MutexLock lock(&cache->mutex_);
  const int64_t slots = retain ? geometry.layers : std::min(2, geometry.layers);
  const int64_t per_slot = geometry.blocks_per_layer();
  auto blocks = pool.Take(slots * per_slot);
  if (!blocks.ok()) {
    cache->freed_ = true;
    return blocks.status();
  }
  cache->slots_.resize(slots);
  for (int64_t s = 0; s < slots; ++s) {
    cache->slots_[s].blocks.assign(blocks->begin() + s * per_slot,
                                   blocks->begin() + (s + 1) * per_slot);
  }
  return cache;
}

KvCache::KvCache(BlockPool& pool, const KvGeometry& geometry, bool retain)
    : pool_(pool),
      geometry_(geometry),
      retain_(retain),
      layers_(geometry.layers, LayerState::kPending) {}

// Pins and transfers hold the cache, so nobody reads any more.
KvCache::~KvCache() {
  absl::MutexLock lock(&mutex_);
  if (freed_) return;
  for (Slot& slot : slots_) pool_.GiveBack(slot.blocks, slot.state);
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

std::byte* KvCache::ComputeTile(int layer, int64_t b, int kv_head, bool value) {
  absl::MutexLock lock(&mutex_);
  return pool_.data(SlotOf(layer).blocks[b]) +
         geometry_.tile_bytes() * (2 * kv_head + (value ? 1 : 0));
}

void KvCache::SetState(Slot& slot, BlockState state) {
  pool_.Move(static_cast<int64_t>(slot.blocks.size()), slot.state, state);
  slot.state = state;
}

std::shared_ptr<const KvCache::Pin> KvCache::PinLocked(int layer) {
  Slot& slot = SlotOf(layer);
  if (slot.pins++ == 0) SetState(slot, BlockState::kTransferring);
  return std::shared_ptr<const Pin>(new Pin(shared_from_this(), layer, &slot.blocks));
}

void KvCache::Commit(int layer) {
  std::vector<std::pair<Ready, std::shared_ptr<const Pin>>> wake;
  {
    absl::MutexLock lock(&mutex_);
    layers_[layer] = LayerState::kReady;
    ++committed_;
    progress_ = absl::Now();
    SetState(SlotOf(layer), BlockState::kLeased);
    for (size_t i = 0; i < waiting_.size();) {
      if (waiting_[i].first != layer) {
        ++i;
        continue;
      }
      wake.emplace_back(std::move(waiting_[i].second), PinLocked(layer));
      waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    }
    FreeIfQuiet();
  }
  for (auto& [ready, pin] : wake) ready(std::move(pin));
}

void KvCache::Fail(absl::Status why) {
  std::vector<std::pair<int, Ready>> wake;
  {
    absl::MutexLock lock(&mutex_);
    if (finished()) return;
    failed_ = why;
    wake.swap(waiting_);
    FreeIfQuiet();
  }
  for (auto& [layer, ready] : wake) ready(why);
}

absl::StatusOr<std::unique_ptr<KvCache::Transfer>> KvCache::Open(std::function<void()> abort) {
  absl::MutexLock lock(&mutex_);
  if (!closed_.ok()) return closed_;
  std::unique_ptr<Transfer> transfer(new Transfer(shared_from_this()));
  transfer->abort_ = std::move(abort);
  transfers_.push_back(transfer.get());
  progress_ = absl::Now();
  return transfer;
}

void KvCache::WhenReady(int layer, Ready ready) {
  absl::StatusOr<std::shared_ptr<const Pin>> now = absl::InternalError("");
  {
    absl::MutexLock lock(&mutex_);
    if (layers_[layer] == LayerState::kReady) {
      now = PinLocked(layer);
    } else if (layers_[layer] == LayerState::kDelivered) {
      now = absl::FailedPreconditionError(
          absl::StrCat("layer ", layer, " was delivered and freed (retain = false)"));
    } else if (!failed_.ok()) {
      now = failed_;
    } else {
      waiting_.emplace_back(layer, std::move(ready));
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
    progress_ = absl::Now();
    if (SlotOf(layer).pins > 0) return;  // Unpin goes on from here
    SetState(SlotOf(layer), BlockState::kComputing);
    on_slot_free = on_slot_free_;
  }
  if (on_slot_free) on_slot_free();
}

void KvCache::Unpin(int layer) {
  std::function<void()> on_slot_free;
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
    FreeIfQuiet();
  }
  if (on_slot_free) on_slot_free();
}

void KvCache::Leave(Transfer* transfer) {
  absl::MutexLock lock(&mutex_);
  transfers_.erase(std::find(transfers_.begin(), transfers_.end(), transfer));
  FreeIfQuiet();
}

void KvCache::Close(absl::Status why) {
  absl::MutexLock lock(&mutex_);
  if (closed_.ok()) closed_ = std::move(why);
  // A slow reader has its whole time from here, even if slowness is what ended the lease.
  for (Transfer* transfer : transfers_) transfer->progress_ = absl::Now();
  FreeIfQuiet();
}

// The engine may still write into the blocks until it has committed the last layer or failed.
void KvCache::FreeIfQuiet() {
  if (freed_ || closed_.ok() || !finished() || !transfers_.empty()) return;
  for (const Slot& slot : slots_) {
    if (slot.pins > 0) return;
  }
  for (Slot& slot : slots_) pool_.GiveBack(slot.blocks, slot.state);
  freed_ = true;
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

absl::Time KvCache::last_progress() const {
  absl::MutexLock lock(&mutex_);
  return progress_;
}

void KvCache::AbortStalled(absl::Time idle_since) {
  std::vector<std::function<void()>> aborts;
  {
    absl::MutexLock lock(&mutex_);
    if (closed_.ok()) return;
    for (Transfer* transfer : transfers_) {
      if (transfer->abort_ && transfer->progress_ <= idle_since) {
        aborts.push_back(std::exchange(transfer->abort_, nullptr));
      }
    }
  }
  for (auto& abort : aborts) abort();
}

}  // namespace prefilld
