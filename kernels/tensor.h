// Element types and strided views: the nouns every kernel shares. Plain data, no ownership. What
// they point to lies where the device computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace prefilld {

enum class DType : uint8_t { kF32, kBF16, kF16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "F32" : dtype == DType::kBF16 ? "BF16" : "F16";
}

// A [tokens, heads, d] tensor. Channels are contiguous; strides count elements.
struct ConstHeadsView {
  const void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};
struct HeadsView {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// A matrix whose rows are contiguous: row t starts t * stride elements after the first.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride = 0;

  Rows From(int64_t row) const {
    return {static_cast<char*>(data) + row * stride * static_cast<int64_t>(SizeOf(dtype)), dtype,
            stride};
  }
};

// Where one sequence's K and V of a layer go: pages of some tokens each, or a single one of all of
// them. In a page lie [kv_heads] matrices [page_tokens, head_dim] of K, and as many of V.
struct KvTarget {
  std::vector<void*> pages;  // the first value of K of each
  int64_t page_tokens = 0;
  int64_t head_stride = 0;   // elements from one head's matrix to the next
  int64_t value_stride = 0;  // elements from K to V
  DType dtype = DType::kF32;
};

}  // namespace prefilld
