// What is prepared, from host memory to the device. One thread reads a mapped file at a fraction of
// what the device takes, so a few share the work: each copies parts through two pinned halves of
// its own, the next being read while the last is on its way. What is enqueued on Stream{} from then
// on finds it; the host memory is read when a call returns. The engine thread alone calls it.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device/cuda_device.h"

namespace prefilld::cuda {

struct Piece {
  const void* data = nullptr;  // null: zeroes
  size_t bytes = 0;
};

class Upload {
 public:
  explicit Upload(CudaDevice& device) : device_(device) {}

  // The pieces one behind the other in a new buffer of the device. Small ones (norms, biases) share
  // an allocation with others, for each takes the device 2 MiB at least.
  absl::Status Pieces(const std::vector<Piece>& pieces, Buffer* buffer);
  template <typename T>
  absl::Status Values(const std::vector<T>& values, Buffer* buffer) {
    return Pieces({{values.data(), values.size() * sizeof(T)}}, buffer);
  }
  // To where the device has a place for them.
  template <typename T>
  absl::Status ValuesTo(const std::vector<T>& values, T* to) {
    return PiecesTo({{values.data(), values.size() * sizeof(T)}}, reinterpret_cast<char*>(to));
  }

 private:
  static constexpr size_t kLanes = 8;
  // Fits into a half.
  struct Part {
    const char* from;
    char* to;
    size_t bytes;
  };
  // What one thread copies through.
  struct Lane {
    struct Half {
      Buffer pinned;
      std::unique_ptr<Device::Mark> copied;  // null: nothing is on its way
    };
    std::array<Half, 2> halves;
    size_t next = 0;
  };
  absl::Status Take(size_t bytes, Buffer* buffer);
  absl::Status PiecesTo(const std::vector<Piece>& pieces, char* to);
  absl::Status Send(const std::vector<Part>& parts);
  absl::Status Send(const Part& part, Lane& lane);

  CudaDevice& device_;
  std::shared_ptr<const Buffer> shared_;  // of small buffers, the last begun; it stays with them
  size_t shared_taken_ = 0;               // bytes of it
  std::array<Lane, kLanes> lanes_;
};

}  // namespace prefilld::cuda
