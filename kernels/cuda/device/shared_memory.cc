#include "kernels/cuda/device/shared_memory.h"

#include <cuda.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::cuda {
namespace {

constexpr auto kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

struct Driver {
  decltype(&cuGetErrorString) error_string = nullptr;
  decltype(&cuDeviceGetAttribute) attribute = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) unreserve = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemExportToShareableHandle) share = nullptr;
  bool complete = true;
};

template <typename Function>
void Find(const char* name, Function* function, bool* complete) {
  constexpr unsigned kVersion = 12000;  // of the least CUDA that is built with
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
  if (error != cudaSuccess) cudaGetLastError();
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) *complete = false;
  *function = reinterpret_cast<Function>(found);
}

const Driver& TheDriver() {
  static const Driver driver = [] {
    Driver d;
    Find("cuGetErrorString", &d.error_string, &d.complete);
    Find("cuDeviceGetAttribute", &d.attribute, &d.complete);
    Find("cuMemGetAllocationGranularity", &d.granularity, &d.complete);
    Find("cuMemCreate", &d.create, &d.complete);
    Find("cuMemRelease", &d.release, &d.complete);
    Find("cuMemAddressReserve", &d.reserve, &d.complete);
    Find("cuMemAddressFree", &d.unreserve, &d.complete);
    Find("cuMemMap", &d.map, &d.complete);
    Find("cuMemUnmap", &d.unmap, &d.complete);
    Find("cuMemSetAccess", &d.set_access, &d.complete);
    Find("cuMemExportToShareableHandle", &d.share, &d.complete);
    return d;
  }();
  return driver;
}

absl::Status ToStatus(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const char* text = nullptr;
  TheDriver().error_string(result, &text);
  const std::string message =
      absl::StrCat(what, ": ", text != nullptr ? text : absl::StrCat("error ", int{result}));
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return absl::ResourceExhaustedError(message);
  if (result == CUDA_ERROR_NOT_SUPPORTED) return absl::UnimplementedError(message);
  return absl::InternalError(message);
}

CUmemAllocationProp PropertiesOn(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = kDescriptor;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  return properties;
}

// Memory at an address of ours, that the device reads and writes. Takes back what it has done where
// it cannot do the rest.
CUresult Map(CUmemGenericAllocationHandle handle, size_t bytes, int device, CUdeviceptr* at) {
  const Driver& driver = TheDriver();
  CUresult result = driver.reserve(at, bytes, 0, 0, 0);
  if (result != CUDA_SUCCESS) return result;
  result = driver.map(*at, bytes, 0, handle, 0);
  if (result == CUDA_SUCCESS) {
    CUmemAccessDesc access{};
    access.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    result = driver.set_access(*at, bytes, &access, 1);
    if (result != CUDA_SUCCESS) driver.unmap(*at, bytes);
  }
  if (result != CUDA_SUCCESS) driver.unreserve(*at, bytes);
  return result;
}

}  // namespace

SharedMemory::SharedMemory(int device, std::shared_ptr<const Streams> streams,
                           std::shared_ptr<MemoryBudget> budget)
    : device_(device), streams_(std::move(streams)), budget_(std::move(budget)) {}

absl::StatusOr<Buffer> SharedMemory::Allocate(size_t bytes) {
  const Driver& driver = TheDriver();
  if (!driver.complete) {
    return absl::UnimplementedError("the CUDA driver shares no memory by descriptor");
  }
  int possible = 0;
  driver.attribute(&possible, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                   device_);
  if (possible == 0) {
    return absl::UnimplementedError("the GPU shares no memory by descriptor on this system");
  }
  cudaSetDevice(device_);  // this thread's first call may be ours
  const CUmemAllocationProp properties = PropertiesOn(device_);
  size_t page = 0;
  CUresult result = driver.granularity(&page, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  if (result != CUDA_SUCCESS) return ToStatus(result, "granularity");
  if (bytes > SIZE_MAX - page) return absl::ResourceExhaustedError("not a size of memory");
  Block block{.bytes = (bytes + page - 1) / page * page};
  if (!budget_->Take(block.bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("shared device memory: ", block.bytes, " bytes, ", budget_->left(), " left"));
  }
  CUdeviceptr at = 0;
  result = driver.create(&block.handle, block.bytes, &properties, 0);
  if (result == CUDA_SUCCESS) {
    result = driver.share(&block.descriptor, block.handle, kDescriptor, 0);
    if (result == CUDA_SUCCESS) result = Map(block.handle, block.bytes, device_, &at);
    if (result != CUDA_SUCCESS) {
      if (block.descriptor >= 0) close(block.descriptor);
      driver.release(block.handle);
    }
  }
  if (result != CUDA_SUCCESS) {
    budget_->Give(block.bytes);
    return ToStatus(result, "shared device memory");
  }
  void* data = reinterpret_cast<void*>(at);
  absl::MutexLock lock(&mutex_);
  blocks_[data] = block;
  return Buffer(data, block.bytes,
                [self = shared_from_this()](void* freed, size_t) { self->Free(freed); });
}

absl::StatusOr<int> SharedMemory::Export(const Buffer& buffer) const {
  absl::MutexLock lock(&mutex_);
  const auto block = blocks_.find(buffer.data());
  if (block == blocks_.end()) return absl::InvalidArgumentError("not memory that is shared");
  const int descriptor = fcntl(block->second.descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor < 0) {
    return absl::ResourceExhaustedError(absl::StrCat("descriptor: ", std::strerror(errno)));
  }
  return descriptor;
}

// What is enqueued now; the work of others too, which is what the streams can tell.
void SharedMemory::AwaitStreams() const {
  for (cudaStream_t stream : streams_->all()) {
    cudaEvent_t event;
    if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync) !=
        cudaSuccess) {
      continue;  // a lost context: nothing runs
    }
    if (cudaEventRecord(event, stream) == cudaSuccess) cudaEventSynchronize(event);
    cudaEventDestroy(event);
  }
  cudaGetLastError();
}

void SharedMemory::Free(void* data) {
  AwaitStreams();
  const Driver& driver = TheDriver();
  Block block;
  {
    absl::MutexLock lock(&mutex_);
    const auto at = blocks_.find(data);
    block = at->second;
    blocks_.erase(at);
  }
  const auto at = reinterpret_cast<CUdeviceptr>(data);
  driver.unmap(at, block.bytes);
  driver.unreserve(at, block.bytes);
  close(block.descriptor);
  driver.release(block.handle);
  budget_->Give(block.bytes);
}

uint64_t SharedMemory::bytes() const {
  absl::MutexLock lock(&mutex_);
  uint64_t bytes = 0;
  for (const auto& [data, block] : blocks_) bytes += block.bytes;
  return bytes;
}

}  // namespace prefilld::cuda
