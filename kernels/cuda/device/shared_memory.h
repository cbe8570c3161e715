// Device memory that other processes can map: made by cuMemCreate, which names it by a descriptor,
// and mapped here. The driver's functions are looked up at run time, so that nothing links libcuda.
// Shared by the device and its buffers, which may outlive it. Threads: any; all of it waits for the
// driver, freeing a buffer also for what is enqueued on the streams then.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/memory_pool.h"

namespace prefilld::cuda {

class SharedMemory : public std::enable_shared_from_this<SharedMemory> {
 public:
  // `device`: the runtime's number of it. streams: that the work runs on which uses such memory.
  // budget: what the memory is taken from.
  SharedMemory(int device, std::shared_ptr<const Streams> streams,
               std::shared_ptr<MemoryBudget> budget);

  // Contents unspecified; rounded up to whole pages of the driver's. RESOURCE_EXHAUSTED when there
  // is no room, UNIMPLEMENTED where driver or device have no such memory.
  absl::StatusOr<Buffer> Allocate(size_t bytes);
  // A new descriptor of one of these, the caller's to close.
  absl::StatusOr<int> Export(const Buffer& buffer) const;
  uint64_t bytes() const;  // in buffers

 private:
  struct Block {
    unsigned long long handle = 0;  // a CUmemGenericAllocationHandle
    size_t bytes = 0;
    int descriptor = -1;  // of which peers get duplicates: the driver may be busy when they ask
  };
  void Free(void* data);
  void AwaitStreams() const;

  const int device_;
  const std::shared_ptr<const Streams> streams_;
  const std::shared_ptr<MemoryBudget> budget_;
  mutable absl::Mutex mutex_;
  std::map<const void*, Block> blocks_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld::cuda
