// What is prepared, from host memory to the device: through two pinned halves, so that the next is
// read (from a mapped file, it may be) while the last one is copied. What is enqueued on Stream{}
// from then on finds it; the host memory is read when a call returns. The engine thread alone.
#pragma once

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

  // The pieces one behind the other in a new buffer of the device.
  absl::Status Pieces(const std::vector<Piece>& pieces, Buffer* buffer);
  template <typename T>
  absl::Status Values(const std::vector<T>& values, Buffer* buffer) {
    return Pieces({{values.data(), values.size() * sizeof(T)}}, buffer);
  }

 private:
  struct Half {
    Buffer pinned;
    std::unique_ptr<Device::Mark> copied;  // null: nothing is on its way
  };
  absl::Status Send(const Piece& piece, char* to);

  CudaDevice& device_;
  Half halves_[2];
  int next_ = 0;
};

}  // namespace prefilld::cuda
