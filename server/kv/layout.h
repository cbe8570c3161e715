// The table of layouts that a pulled layer may have: K and V are a tensor each, read here by byte
// range out of a cache's tiles, without a copy where layout and dtype allow. Admission searches the
// table, and a pull calls the row that was found: a new layout is a row and its functions. Pure
// functions over a pin; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/tensor.h"
#include "server/kv/kv_cache.h"

namespace prefilld {

struct ByteSpan {
  const std::byte* data;
  size_t bytes;
};

// Bytes [offset, offset + bytes) of the K, or V, of a pinned layer; within the tensor.
struct KvRange {
  bool value = false;  // V
  uint64_t offset = 0;
  size_t bytes = 0;
};

// The axes of a layout; values of v1::Axis.
enum class KvAxis { kLayer = 1, kKv, kBlock, kHead, kToken, kChannel };

struct KvLayout {
  const char* name;
  std::array<KvAxis, 5> order;  // outermost first
  bool in_regions;              // what lies in a region lies there like this
  // Bytes of K (or V) of one layer in `dtype`.
  uint64_t (*tensor_bytes)(const KvGeometry& geometry, DType dtype);
  // The pieces of the pinned tiles that are the range of the tensor in the cache's dtype. Valid
  // while the pin lives. Null: always converted.
  std::vector<ByteSpan> (*spans)(const KvCache::Pin& pin, const KvRange& range);
  // The range of the tensor in `dtype` (round to nearest even), written to out[range.bytes].
  void (*convert)(const KvCache::Pin& pin, DType dtype, const KvRange& range, std::byte* out);
};

// [kv_head, token, d]
uint64_t HfTensorBytes(const KvGeometry& geometry, DType dtype);
std::vector<ByteSpan> HfSpans(const KvCache::Pin& pin, const KvRange& range);
void ConvertHf(const KvCache::Pin& pin, DType dtype, const KvRange& range, std::byte* out);

// The first is the default.
inline constexpr std::array<KvLayout, 1> kKvLayouts = {{
    {.name = "hugging_face",
     .order = {KvAxis::kLayer, KvAxis::kKv, KvAxis::kHead, KvAxis::kToken, KvAxis::kChannel},
     .in_regions = true,
     .tensor_bytes = HfTensorBytes,
     .spans = HfSpans,
     .convert = ConvertHf},
}};

// What a pull reads: a row of the table, in a dtype.
struct KvForm {
  const KvLayout* layout = &kKvLayouts[0];
  DType dtype = DType::kF32;

  uint64_t tensor_bytes(const KvGeometry& geometry) const {
    return layout->tensor_bytes(geometry, dtype);
  }
};

}  // namespace prefilld
