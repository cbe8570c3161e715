// A backend runs the stages of attention and the other operations of a transformer on one device.
// The engine thread alone calls it. Stages are enqueued on a stream and never wait for it; the CPU
// backend's only stream runs inline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/ops.h"

namespace prefilld {

// Device memory, freed with its owner.
class Buffer {
 public:
  using Free = void (*)(void* data, size_t bytes);
  Buffer() = default;
  Buffer(void* data, size_t bytes, Free free) : data_(data), bytes_(bytes), free_(free) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Free free_ = nullptr;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string_view name() const = 0;  // for logs: CPU model, GPU name
  // Zeroed memory, 64-byte aligned; RESOURCE_EXHAUSTED when there is none. On the CPU pages are
  // taken from the system at first touch.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  // The contents of this part of a buffer are of no use any more: what the system can have of its
  // memory it gets, until the part is written again. Unspecified until then.
  virtual void Discard(void* data, size_t bytes) = 0;
  virtual absl::Status Synchronize(Stream stream) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;  // "cpu"
  virtual Device& device() = 0;
  virtual Ops& ops() = 0;

  // The admission check: UNIMPLEMENTED, naming what was asked and what exists. Threads: any.
  virtual absl::Status Supports(const AttentionShape& shape,
                                const SparsityPolicy& policy) const = 0;

  // Stage 1: probes rows, leaves the method's maps in the backend's workspace.
  virtual absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) = 0;
  // Stage 2: writes args.index, and pattern, dense_reason and density of args.report.
  virtual absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) = 0;
  // Between 2 and 3, when policy.measure_captured_mass or min_captured_mass asks for it: captured
  // mass of every head on its own sampled rows; heads below the minimum get every causal block.
  virtual absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) = 0;
  // Stage 3: attention over the blocks in args.index; reads nothing else of the method.
  virtual absl::Status Attend(const AttentionArgs& args, Stream stream) = 0;
};

// The closed table of backends: "auto" picks the best one that this build and machine have.
// threads: 0 means all processors. INVALID_ARGUMENT for an unknown name.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name, int threads);

}  // namespace prefilld
