// Memory of one kind, given back by its owner and kept for the next. cudaMalloc takes a millisecond
// a GiB, pinning host memory 300, and to free either stops the device: an RPC thread can do none of
// that for every call. Threads: any. Take waits for the driver where nothing kept fits; giving back
// never waits.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/memory_budget.h"

namespace prefilld::cuda {

// The device's streams: everything that is enqueued is on one of them. Shared by whoever outlives
// the device, the buffers of its pools.
struct Streams {
  cudaStream_t compute = nullptr;   // Stream{}
  cudaStream_t upload = nullptr;    // Device::upload_stream()
  cudaStream_t download = nullptr;  // Device::download_stream()
  static constexpr size_t kCount = 3;
  std::array<cudaStream_t, kCount> all() const { return {compute, upload, download}; }
  ~Streams();
};

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  enum class Kind { kDevice, kPinned };

  // Keeps at most keep_bytes of what has been given back; what it has, kept or not, is the
  // budget's.
  MemoryPool(Kind kind, size_t keep_bytes, std::shared_ptr<const Streams> streams,
             std::shared_ptr<MemoryBudget> budget);
  ~MemoryPool();  // when the last buffer is gone

  // A buffer of `bytes`, at the begin of an allocation of its own; contents unspecified. It goes
  // back to the pool, and is handed out again when the work that was enqueued until then is done.
  cudaError_t Take(size_t bytes, Buffer* buffer);
  // Frees what is kept beyond the bound. May wait for the device: for whom has just waited for it;
  // what is copied out meanwhile delays it.
  void Trim();
  bool Drop();  // the same of all that is kept; whether that was anything

  uint64_t used_bytes() const;  // in buffers
  uint64_t kept_bytes() const;

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    std::array<cudaEvent_t, Streams::kCount> last_use{};  // on each stream, of who gave it back
  };
  void Give(void* data);
  void Free(const Block& block) const;
  cudaError_t Allocate(Block* block) const;
  std::deque<Block> Surplus(size_t keep) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Kind kind_;
  const size_t keep_bytes_;
  const std::shared_ptr<const Streams> streams_;
  const std::shared_ptr<MemoryBudget> budget_;
  mutable absl::Mutex mutex_;
  std::deque<Block> used_ ABSL_GUARDED_BY(mutex_);
  std::deque<Block> kept_ ABSL_GUARDED_BY(mutex_);  // oldest first
};

}  // namespace prefilld::cuda
