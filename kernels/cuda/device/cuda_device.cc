#include "kernels/cuda/device/cuda_device.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/cuda/device/status.h"

namespace prefilld::cuda {
namespace {

constexpr int kCapabilityMin = 80;
// Kept of what calls have given back: an eighth of the device, and of the host what a few long
// prompts need.
constexpr size_t kDeviceKeptShare = 8;
constexpr size_t kPinnedKeptBytes = size_t{4} << 30;

std::string Uuid(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    absl::StrAppendFormat(&text, "%02x", static_cast<unsigned char>(uuid.bytes[i]));
  }
  return text;
}

// Makes what is enqueued on `stream` from now on wait for what is on `before` now.
cudaError_t WaitFor(cudaStream_t stream, cudaStream_t before) {
  cudaEvent_t event;
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error != cudaSuccess) return error;
  error = cudaEventRecord(event, before);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(stream, event);
  cudaEventDestroy(event);  // the driver lets go of it when it has happened
  return error;
}

class EventMark : public Device::Mark {
 public:
  EventMark(CudaDevice& device, cudaEvent_t event) : device_(device), event_(event) {}
  ~EventMark() override { cudaEventDestroy(event_); }

  absl::Status Record(Stream stream) override {
    return device_.Check(cudaEventRecord(event_, device_.stream(stream)), "event");
  }
  cudaError_t Before(cudaStream_t stream) const {
    const cudaError_t reached = cudaEventQuery(event_);
    return reached == cudaErrorNotReady ? cudaStreamWaitEvent(stream, event_) : reached;
  }
  absl::Status Await() override { return device_.Check(cudaEventSynchronize(event_), "device"); }
  double SecondsSince(const Mark& earlier) const override {
    float milliseconds = 0;
    const cudaEvent_t begin = static_cast<const EventMark&>(earlier).event_;
    const cudaError_t error = cudaEventElapsedTime(&milliseconds, begin, event_);
    return device_.Check(error, "event").ok() ? milliseconds * 1e-3 : 0;
  }

 private:
  CudaDevice& device_;
  const cudaEvent_t event_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Open(uint64_t memory_bytes) {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return absl::UnavailableError("no CUDA driver on this machine");
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    const cudaError_t why = error != cudaSuccess ? error : cudaErrorNoDevice;
    return absl::UnavailableError(absl::StrCat("no CUDA device: ", cudaGetErrorString(why)));
  }
  std::unique_ptr<CudaDevice> device(new CudaDevice(memory_bytes));
  if (absl::Status status = device->Init(); !status.ok()) {
    return absl::UnavailableError(status.message());
  }
  if (device->capability() < kCapabilityMin) {
    return absl::UnavailableError(
        absl::StrFormat("%s has compute capability %d.%d; there are kernels from 8.0 up",
                        device->name_, device->properties_.major, device->properties_.minor));
  }
  return device;
}

absl::Status CudaDevice::Init() {
  const auto create = [this](cudaStream_t* stream) {
    return Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "stream");
  };
  absl::Status status = Check(cudaSetDevice(0), "device");
  if (status.ok()) status = Check(cudaGetDeviceProperties(&properties_, 0), "device");
  if (status.ok()) status = create(&streams_->compute);
  if (status.ok()) status = create(&streams_->upload);
  if (status.ok()) status = create(&streams_->download);
  if (status.ok()) status = create(&zero_);
  if (!status.ok()) return status;
  name_ = absl::StrFormat("%s (sm_%d, %d SMs, %d GiB)", properties_.name, capability(),
                          multiprocessors(), properties_.totalGlobalMem >> 30);
  uuid_ = Uuid(properties_.uuid);
  device_pool_ = std::make_shared<MemoryPool>(
      MemoryPool::Kind::kDevice, properties_.totalGlobalMem / kDeviceKeptShare, streams_, budget_);
  pinned_pool_ = std::make_shared<MemoryPool>(MemoryPool::Kind::kPinned, kPinnedKeptBytes, streams_,
                                              std::make_shared<MemoryBudget>());
  shared_ = std::make_shared<SharedMemory>(0, streams_, budget_);
  return absl::OkStatus();
}

CudaDevice::~CudaDevice() {
  if (zero_ != nullptr) cudaStreamDestroy(zero_);
}

absl::Status CudaDevice::Check(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const char* none = fault_.load();
  const char* kind = FaultKind(error);
  if (*none == '\0' && *kind != '\0') fault_.compare_exchange_strong(none, kind);
  cudaGetLastError();  // what is not a fault is told once
  return ToStatus(error, what);
}

absl::Status CudaDevice::Take(MemoryPool& pool, size_t bytes, const char* what, Buffer* buffer) {
  const cudaError_t error = bytes == 0 ? cudaSuccess : pool.Take(bytes, buffer);
  if (error != cudaErrorMemoryAllocation) return Check(error, what);
  return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes of ", what));
}

absl::StatusOr<Buffer> CudaDevice::Allocate(size_t bytes) {
  Buffer buffer;
  absl::Status status = Take(*device_pool_, bytes, "device memory", &buffer);
  if (!status.ok() || bytes == 0) return status.ok() ? absl::StatusOr<Buffer>(Buffer()) : status;
  // What the last owner left is nobody's business. Nothing on any stream is before the zeroes.
  status = Check(cudaMemsetAsync(buffer.data(), 0, bytes, zero_), "memset");
  for (cudaStream_t stream : streams_->all()) {
    if (status.ok()) status = Check(WaitFor(stream, zero_), "memset");
  }
  if (!status.ok()) return status;
  return buffer;
}

std::optional<uint64_t> CudaDevice::free_bytes() const {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return std::nullopt;
  return std::min<uint64_t>(free, budget_->left()) +
         device_pool_->kept_bytes();  // which goes where it is in the way
}

absl::StatusOr<Buffer> CudaDevice::AllocateHost(size_t bytes) {
  Buffer buffer;
  absl::Status status = Take(*pinned_pool_, bytes, "pinned host memory", &buffer);
  if (!status.ok()) return status;
  return buffer;
}

absl::StatusOr<Buffer> CudaDevice::Register(void* data, size_t bytes) {
  absl::Status status = Check(cudaHostRegister(data, bytes, cudaHostRegisterPortable), "register");
  if (!status.ok()) return status;
  return Buffer(data, bytes, [](void* registered, size_t) { cudaHostUnregister(registered); });
}

absl::Status CudaDevice::Copy(void* dst, const void* src, size_t bytes, Stream on) {
  return Check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream(on)), "copy");
}

absl::Status CudaDevice::Wait(Stream on, Stream before) {
  return Check(WaitFor(stream(on), stream(before)), "wait");
}

absl::Status CudaDevice::Wait(Stream on, const Mark& mark) {
  return Check(static_cast<const EventMark&>(mark).Before(stream(on)), "wait");
}

absl::Status CudaDevice::Synchronize(Stream on) {
  absl::Status status = Check(cudaStreamSynchronize(stream(on)), "device");
  if (status.ok() && stream(on) == streams_->compute) {
    device_pool_->Trim();
    pinned_pool_->Trim();
  }
  return status;
}

absl::StatusOr<std::unique_ptr<Device::Mark>> CudaDevice::NewMark() {
  cudaEvent_t event;
  // Who waits sleeps: the thread that submits work needs the processor more.
  absl::Status status = Check(cudaEventCreateWithFlags(&event, cudaEventBlockingSync), "event");
  if (!status.ok()) return status;
  return std::make_unique<EventMark>(*this, event);
}

std::vector<Device::Memory> CudaDevice::memory() const {
  return {{"device", device_pool_->used_bytes()},
          {"device_kept", device_pool_->kept_bytes()},
          {"pinned", pinned_pool_->used_bytes()},
          {"pinned_kept", pinned_pool_->kept_bytes()},
          {"shared", shared_->bytes()}};
}

absl::StatusOr<Buffer> CudaDevice::AllocateShared(size_t bytes) {
  auto buffer = shared_->Allocate(bytes);
  // What is kept for others may be in the way.
  if (absl::IsResourceExhausted(buffer.status()) && device_pool_->Drop()) {
    buffer = shared_->Allocate(bytes);
  }
  if (!buffer.ok()) return buffer;
  absl::Status status = Zero(buffer->data(), buffer->bytes());
  if (!status.ok()) return status;
  return buffer;
}

absl::Status CudaDevice::Zero(void* data, size_t bytes) {
  absl::Status status = Check(cudaMemsetAsync(data, 0, bytes, zero_), "memset");
  return status.ok() ? Check(cudaStreamSynchronize(zero_), "memset") : status;
}

}  // namespace prefilld::cuda
