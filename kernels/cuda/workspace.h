// Parts of a workspace, one after the other, each at a multiple of 256 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace prefilld::cuda {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Hands out parts of the memory at `base`; with no base it only counts.
class Workspace {
 public:
  static constexpr int64_t kAlignment = 256;
  static constexpr int64_t Aligned(int64_t bytes) {
    return CeilDiv(bytes, kAlignment) * kAlignment;
  }

  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void Take(T** part, int64_t count) {
    *part = reinterpret_cast<T*>(base_ + used_);
    used_ += Aligned(count * static_cast<int64_t>(sizeof(T)));
  }
  int64_t used() const { return used_; }
  void Rewind(int64_t used) { used_ = used; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace prefilld::cuda
