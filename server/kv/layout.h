// The Hugging Face layout of a pulled layer: K and V are tensors [kv_head, token, d], read here by
// byte range out of a cache's tiles, without a copy where the dtype is the cache's own. Pure
// functions over a pin; any thread.
#pragma once

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

// Bytes of K (or V) of one layer as [kv_head, token, d] of `dtype`.
uint64_t HfTensorBytes(const KvGeometry& geometry, DType dtype);

// The pieces of the pinned tiles that are bytes [offset, offset + bytes) of the layer's K, or V, in
// the cache's dtype. The range lies within the tensor. Valid while the pin lives.
std::vector<ByteSpan> HfSpans(const KvCache::Pin& pin, bool value, uint64_t offset, size_t bytes);

// The same range of the tensor converted to `dtype` (round to nearest even), written to out[bytes].
void ConvertHf(const KvCache::Pin& pin, bool value, DType dtype, uint64_t offset, size_t bytes,
               std::byte* out);

}  // namespace prefilld
