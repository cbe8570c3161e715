#include "server/kv/layout.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace prefilld {
namespace {

float Load(DType dtype, const std::byte* from) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  if (dtype == DType::kBF16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  _Float16 half;
  std::memcpy(&half, &bits, sizeof(half));
  return static_cast<float>(half);
}

void Store(DType dtype, float value, std::byte* to) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(to, &value, sizeof(value));
      return;
    case DType::kBF16: {
      uint32_t wide;
      std::memcpy(&wide, &value, sizeof(wide));
      // Rounding could carry a NaN's mantissa into infinity: it keeps its upper half, made quiet.
      const uint32_t rounded =
          value != value ? wide | 0x400000 : wide + 0x7fff + ((wide >> 16) & 1);
      const uint16_t bits = static_cast<uint16_t>(rounded >> 16);
      std::memcpy(to, &bits, sizeof(bits));
      return;
    }
    case DType::kF16: {
      const _Float16 half = static_cast<_Float16>(value);
      std::memcpy(to, &half, sizeof(half));
      return;
    }
  }
}

// Calls visit(data, bytes) for the pieces of [offset, offset + bytes), one tile at a time.
template <typename Visit>
void ForEachSpan(const KvCache::Pin& pin, bool value, uint64_t offset, uint64_t bytes,
                 Visit&& visit) {
  const KvGeometry& geometry = pin.geometry();
  const uint64_t tile_bytes = geometry.tile_bytes();
  const uint64_t head_bytes = geometry.tensor_bytes() / geometry.kv_heads;
  while (bytes > 0) {
    const int head = static_cast<int>(offset / head_bytes);
    const uint64_t within = offset % head_bytes;
    const uint64_t in_tile = within % tile_bytes;
    // The last tile of a head ends with the prompt.
    const uint64_t size = std::min({bytes, tile_bytes - in_tile, head_bytes - within});
    visit(pin.tile(static_cast<int64_t>(within / tile_bytes), head, value) + in_tile, size);
    offset += size;
    bytes -= size;
  }
}

}  // namespace

uint64_t HfTensorBytes(const KvGeometry& geometry, DType dtype) {
  return geometry.tensor_bytes() / SizeOf(geometry.dtype) * SizeOf(dtype);
}

std::vector<ByteSpan> HfSpans(const KvCache::Pin& pin, bool value, uint64_t offset, size_t bytes) {
  std::vector<ByteSpan> spans;
  ForEachSpan(pin, value, offset, bytes, [&](const std::byte* data, size_t size) {
    spans.push_back({data, size});
  });
  return spans;
}

void ConvertHf(const KvCache::Pin& pin, bool value, DType dtype, uint64_t offset, size_t bytes,
               std::byte* out) {
  const DType from = pin.geometry().dtype;
  const size_t from_size = SizeOf(from), to_size = SizeOf(dtype);
  // Whole elements; the first and the last may be cut by the range.
  const uint64_t first = offset / to_size;
  const uint64_t end = (offset + bytes + to_size - 1) / to_size;
  uint64_t element = first;
  ForEachSpan(pin, value, first * from_size, (end - first) * from_size,
              [&](const std::byte* data, size_t size) {
                for (; size > 0; size -= from_size, data += from_size, ++element) {
                  std::array<std::byte, 4> converted;
                  Store(dtype, Load(from, data), converted.data());
                  const uint64_t begin = element * to_size;
                  const uint64_t lo = std::max(begin, offset);
                  const uint64_t hi = std::min(begin + to_size, offset + bytes);
                  std::memcpy(out + (lo - offset), converted.data() + (lo - begin), hi - lo);
                }
              });
}

}  // namespace prefilld
