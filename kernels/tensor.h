// Element types and strided views: the nouns every kernel shares. Plain data, no ownership.
#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace prefilld
