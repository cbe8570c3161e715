// Host memory as a device. Threads: any. Nothing here blocks.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace prefilld::cpu {

// Zeroed pages straight from the system, taken at first touch and given back with the buffer;
// 64-byte aligned. RESOURCE_EXHAUSTED when there are none.
absl::StatusOr<Buffer> AllocatePages(size_t bytes);

class CpuDevice : public Device {
 public:
  CpuDevice();

  std::string_view name() const override { return name_; }
  bool host_memory() const override { return true; }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return AllocatePages(bytes); }
  absl::StatusOr<Buffer> AllocateHost(size_t bytes) override { return AllocatePages(bytes); }
  void Discard(void* data, size_t bytes) override;
  Stream upload_stream() const override { return {}; }
  Stream download_stream() const override { return {}; }
  absl::StatusOr<Buffer> Register(void*, size_t) override { return Buffer(); }
  absl::Status Copy(void* dst, const void* src, size_t bytes, Stream) override;
  // All work runs inline.
  absl::Status Wait(Stream, Stream) override { return absl::OkStatus(); }
  absl::Status Wait(Stream, const Mark&) override { return absl::OkStatus(); }
  absl::Status Synchronize(Stream) override { return absl::OkStatus(); }
  absl::StatusOr<std::unique_ptr<Mark>> NewMark() override;

 private:
  std::string name_;  // "AMD EPYC 9755 (AVX3)"
};

}  // namespace prefilld::cpu
