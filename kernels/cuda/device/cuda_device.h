// One CUDA device: the first that CUDA_VISIBLE_DEVICES leaves. Threads: any.
//
// Every error of a call that goes through Check() or Synchronize() is looked at: one that the
// context does not survive is remembered for fault().
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/memory_pool.h"
#include "kernels/cuda/device/shared_memory.h"

namespace prefilld::cuda {

class CudaDevice : public Device {
 public:
  // UNAVAILABLE, in one line for the operator, without a driver or a device that can be used.
  // memory_bytes: what is taken of its memory at most, beside the context.
  static absl::StatusOr<std::unique_ptr<CudaDevice>> Open(
      uint64_t memory_bytes = MemoryBudget::kAll);
  ~CudaDevice() override;

  std::string_view name() const override { return name_; }
  bool host_memory() const override { return false; }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  std::optional<uint64_t> free_bytes() const override;
  absl::StatusOr<Buffer> AllocateHost(size_t bytes) override;
  absl::StatusOr<Buffer> Register(void* data, size_t bytes) override;
  void Discard(void*, size_t) override {}  // neither it nor what is pinned has pages to give back
  Stream upload_stream() const override { return {streams_->upload}; }
  Stream download_stream() const override { return {streams_->download}; }
  absl::Status Copy(void* dst, const void* src, size_t bytes, Stream stream) override;
  absl::Status Wait(Stream stream, Stream before) override;
  absl::Status Wait(Stream stream, const Mark& mark) override;
  absl::Status Synchronize(Stream stream) override;
  absl::StatusOr<std::unique_ptr<Mark>> NewMark() override;
  std::string_view fault() const override { return fault_.load(); }
  std::vector<Memory> memory() const override;
  std::string_view uuid() const override { return uuid_; }
  absl::StatusOr<Buffer> AllocateShared(size_t bytes) override;
  absl::StatusOr<int> ExportShared(const Buffer& buffer) override {
    return shared_->Export(buffer);
  }
  absl::Status Zero(void* data, size_t bytes) override;

  int capability() const { return properties_.major * 10 + properties_.minor; }  // 90
  int multiprocessors() const { return properties_.multiProcessorCount; }
  cudaStream_t stream(Stream stream) const {
    return stream.handle == nullptr ? streams_->compute : static_cast<cudaStream_t>(stream.handle);
  }
  // What a call of `what` returned.
  absl::Status Check(cudaError_t error, std::string_view what);

 private:
  explicit CudaDevice(uint64_t memory_bytes)
      : budget_(std::make_shared<MemoryBudget>(memory_bytes)) {}
  absl::Status Init();
  absl::Status Take(MemoryPool& pool, size_t bytes, const char* what, Buffer* buffer);

  cudaDeviceProp properties_{};
  std::string name_, uuid_;
  std::shared_ptr<Streams> streams_ = std::make_shared<Streams>();
  cudaStream_t zero_ = nullptr;  // where new memory is zeroed: behind no upload and no stage
  const std::shared_ptr<MemoryBudget> budget_;  // of its memory
  std::shared_ptr<MemoryPool> device_pool_, pinned_pool_;
  std::shared_ptr<SharedMemory> shared_;
  std::atomic<const char*> fault_{""};
};

}  // namespace prefilld::cuda
