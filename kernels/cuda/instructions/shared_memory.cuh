// Addresses in shared memory, and tiles of rows there as the matrix instructions read them.
#pragma once

#include <bit>
#include <cstdint>

namespace prefilld::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Orders ordinary stores to shared memory before the reads of wgmma and TMA.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

constexpr int kRowBytes = 128;  // of a row of a slab: 64 channels of 16 bits

// A tile of 16-bit channels is held in slabs of 64 channels of all its rows, a slab in rows of 128
// bytes whose 16-byte pieces are swizzled (piece ^ row % 8): what wgmma wants, and free of bank
// conflicts for ldmatrix. Where piece `piece` (8 channels) of a row lies; slabs are `slab` bytes
// apart, and a tile begins at a multiple of 1024 bytes.
template <typename Int>
__device__ __forceinline__ Int PieceOffset(Int row, Int piece, Int slab) {
  return piece / 8 * slab + row * kRowBytes + ((piece % 8) ^ (row % 8)) * 16;
}

// A tile whose size the compiler knows. At d = 96 the last 32 channels are zeros.
template <int kChannels, int kRows>
struct RowTile {
  static constexpr int kPadded = (kChannels + 63) / 64 * 64;
  static constexpr int kChunks = kPadded / 8;  // of a row; the first kChannels / 8 hold channels
  // Threads that copy a row, a chunk each: a power of two, which divides a thread block. Those
  // beyond kChunks have none.
  static constexpr int kCopiers = static_cast<int>(std::bit_ceil(static_cast<unsigned>(kChunks)));
  static constexpr int kHalfBytes = kRows * kRowBytes;
  static constexpr int kBytes = kRows * kPadded * 2;
  static __device__ __forceinline__ int Offset(int row, int chunk) {
    return PieceOffset(row, chunk, kHalfBytes);
  }
};

}  // namespace prefilld::cuda
