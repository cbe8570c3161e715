#include "kernels/cuda/device/memory_pool.h"

#include <algorithm>
#include <utility>

namespace prefilld::cuda {
namespace {

// What an allocation is rounded up to. The driver has pages of 2 MiB of device memory.
constexpr size_t kDeviceUnit = size_t{2} << 20;
constexpr size_t kPinnedUnit = size_t{64} << 10;

bool Idle(const std::array<cudaEvent_t, Streams::kCount>& last_use) {
  return std::all_of(last_use.begin(), last_use.end(),
                     [](cudaEvent_t event) { return cudaEventQuery(event) == cudaSuccess; });
}

template <typename Blocks>
uint64_t BytesOf(const Blocks& blocks) {
  uint64_t bytes = 0;
  for (const auto& block : blocks) bytes += block.bytes;
  return bytes;
}

}  // namespace

Streams::~Streams() {
  for (cudaStream_t stream : all()) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
}

MemoryPool::MemoryPool(Kind kind, size_t keep_bytes, std::shared_ptr<const Streams> streams,
                       std::shared_ptr<MemoryBudget> budget)
    : kind_(kind),
      keep_bytes_(keep_bytes),
      streams_(std::move(streams)),
      budget_(std::move(budget)) {}

MemoryPool::~MemoryPool() {
  for (const Block& block : kept_) Free(block);
}

cudaError_t MemoryPool::Allocate(Block* block) const {
  if (!budget_->Take(block->bytes)) return cudaErrorMemoryAllocation;
  cudaError_t error = kind_ == Kind::kDevice
                          ? cudaMalloc(&block->data, block->bytes)
                          : cudaHostAlloc(&block->data, block->bytes, cudaHostAllocPortable);
  for (cudaEvent_t& event : block->last_use) {
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  }
  if (error != cudaSuccess) {
    Free(*block);
    *block = {.bytes = block->bytes};
    cudaGetLastError();  // the next call works
  }
  return error;
}

void MemoryPool::Free(const Block& block) const {
  for (cudaEvent_t event : block.last_use) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (block.data != nullptr) {
    kind_ == Kind::kDevice ? cudaFree(block.data) : cudaFreeHost(block.data);
  }
  budget_->Give(block.bytes);
}

// The oldest beyond `keep` bytes, taken out.
std::deque<MemoryPool::Block> MemoryPool::Surplus(size_t keep) {
  std::deque<Block> surplus;
  for (uint64_t held = BytesOf(kept_); held > keep; kept_.pop_front()) {
    held -= kept_.front().bytes;
    surplus.push_back(kept_.front());
  }
  return surplus;
}

cudaError_t MemoryPool::Take(size_t bytes, Buffer* buffer) {
  const size_t unit = kind_ == Kind::kDevice ? kDeviceUnit : kPinnedUnit;
  if (bytes > SIZE_MAX - unit) return cudaErrorMemoryAllocation;
  Block block = {.bytes = (bytes + unit - 1) / unit * unit};
  {
    absl::MutexLock lock(&mutex_);
    const auto fits = [&](const Block& kept) {  // not a quarter too large: it may be missing then
      return kept.bytes >= block.bytes && kept.bytes - block.bytes <= kept.bytes / 4 &&
             Idle(kept.last_use);
    };
    const auto found = std::find_if(kept_.begin(), kept_.end(), fits);
    if (found != kept_.end()) {
      block = *found;
      kept_.erase(found);
    }
  }
  if (block.data == nullptr) {
    cudaError_t error = Allocate(&block);
    // What is kept may be in the way.
    if (error == cudaErrorMemoryAllocation && Drop()) error = Allocate(&block);
    if (error != cudaSuccess) return error;
  }
  absl::MutexLock lock(&mutex_);
  used_.push_back(block);
  *buffer = Buffer(block.data, bytes,
                   [self = shared_from_this()](void* data, size_t) { self->Give(data); });
  return cudaSuccess;
}

void MemoryPool::Give(void* data) {
  absl::MutexLock lock(&mutex_);
  const auto at = std::find_if(used_.begin(), used_.end(),
                               [data](const Block& block) { return block.data == data; });
  const Block block = *at;
  used_.erase(at);
  const std::array<cudaStream_t, Streams::kCount> streams = streams_->all();
  for (size_t i = 0; i < streams.size(); ++i) cudaEventRecord(block.last_use[i], streams[i]);
  kept_.push_back(block);
}

void MemoryPool::Trim() {
  std::deque<Block> surplus;
  {
    absl::MutexLock lock(&mutex_);
    surplus = Surplus(keep_bytes_);
  }
  for (const Block& block : surplus) Free(block);
}

bool MemoryPool::Drop() {
  std::deque<Block> all;
  {
    absl::MutexLock lock(&mutex_);
    all = Surplus(0);
  }
  for (const Block& kept : all) Free(kept);
  return !all.empty();
}

uint64_t MemoryPool::used_bytes() const {
  absl::MutexLock lock(&mutex_);
  return BytesOf(used_);
}
uint64_t MemoryPool::kept_bytes() const {
  absl::MutexLock lock(&mutex_);
  return BytesOf(kept_);
}

}  // namespace prefilld::cuda
