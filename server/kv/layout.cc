#include "server/kv/layout.h"

#include <algorithm>
#include <cstring>

#include "kernels/convert.h"

namespace prefilld {
namespace {

// Calls visit(data, bytes) for the pieces of [offset, offset + bytes), one tile at a time.
template <typename Visit>
void ForEachSpan(const KvCache::Pin& pin, const KvRange& range, Visit&& visit) {
  uint64_t offset = range.offset, bytes = range.bytes;
  const KvGeometry& geometry = pin.geometry();
  const uint64_t tile_bytes = geometry.tile_bytes();
  const uint64_t head_bytes = geometry.tensor_bytes() / geometry.kv_heads;
  while (bytes > 0) {
    const int head = static_cast<int>(offset / head_bytes);
    const uint64_t within = offset % head_bytes;
    const uint64_t in_tile = within % tile_bytes;
    // The last tile of a head ends with the prompt.
    const uint64_t size = std::min({bytes, tile_bytes - in_tile, head_bytes - within});
    visit(pin.tile(static_cast<int64_t>(within / tile_bytes), head, range.value) + in_tile, size);
    offset += size;
    bytes -= size;
  }
}

}  // namespace

uint64_t HfTensorBytes(const KvGeometry& geometry, DType dtype) {
  return geometry.tensor_bytes() / SizeOf(geometry.dtype) * SizeOf(dtype);
}

std::vector<ByteSpan> HfSpans(const KvCache::Pin& pin, const KvRange& range) {
  std::vector<ByteSpan> spans;
  ForEachSpan(pin, range, [&](const std::byte* data, size_t size) {
    spans.push_back({data, size});
  });
  return spans;
}

void ConvertHf(const KvCache::Pin& pin, DType dtype, const KvRange& range, std::byte* out) {
  constexpr uint64_t kBatch = 1024;  // elements; small enough to stay in the first cache
  alignas(64) std::byte converted[kBatch * sizeof(float)];
  const DType from = pin.geometry().dtype;
  const size_t from_size = SizeOf(from), to_size = SizeOf(dtype);
  // Whole elements are converted; of the first and the last the range may want only a part.
  uint64_t element = range.offset / to_size;
  const uint64_t range_end = range.offset + range.bytes;
  const uint64_t end = (range_end + to_size - 1) / to_size;
  ForEachSpan(pin, {range.value, element * from_size, (end - element) * from_size},
              [&](const std::byte* data, uint64_t size) {
                for (uint64_t left = size / from_size; left > 0;) {
                  const uint64_t count = std::min(left, kBatch);
                  Convert({.src = data,
                           .from = from,
                           .dst = converted,
                           .to = dtype,
                           .count = static_cast<int64_t>(count)});
                  const uint64_t begin = element * to_size;
                  const uint64_t first = std::max(begin, range.offset);
                  const uint64_t last = std::min(begin + count * to_size, range_end);
                  std::memcpy(out + (first - range.offset), converted + (first - begin),
                              last - first);
                  data += count * from_size;
                  element += count;
                  left -= count;
                }
              });
}

}  // namespace prefilld
