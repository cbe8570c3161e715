// FlexPrefill, first pass over K: maximum and sum of the softmax of every probe row (the last
// block_size tokens), in chunks of keys; and the mean key of every block.
#include "kernels/cuda/select/flexprefill/tile.cuh"

namespace prefilld::cuda {
namespace {

// Keys of a tile. 128 make wgmma read 96 bytes of shared memory a clock at its full rate, of the
// 128 there are; 64 would make it 128.
constexpr int kKeys = 128;
constexpr int kColumns = kKeys;

struct Shape {
  int row_tiles;   // of 64 probe rows, in a thread block
  int warpgroups;  // each has row_tiles / warpgroups of them, 1 or 2
  int stages;      // of the ring of keys
};

// Adds the keys of a tile to a row of softmax.
struct Softmax {
  float max = -kInfinity, sum = 0;

  // The logits of one row in c[4 i + 2 x + {0, 1}].
  __device__ __forceinline__ void Add(const float (&c)[kColumns / 2], int x) {
    float tile_max = c[2 * x];
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      tile_max = fmaxf(tile_max, fmaxf(c[4 * i + 2 * x], c[4 * i + 2 * x + 1]));
    }
    const float new_max = fmaxf(max, tile_max);
    const float reference = new_max == -kInfinity ? 0 : new_max * kLog2e;
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      even += Exp2(fmaf(c[4 * i + 2 * x], kLog2e, -reference));
      odd += Exp2(fmaf(c[4 * i + 2 * x + 1], kLog2e, -reference));
    }
    sum = sum * Exp2(fmaf(max, kLog2e, -reference)) + (even + odd);
    max = new_max;
  }
  __device__ __forceinline__ void Merge(float other_max, float other_sum) {
    const float new_max = fmaxf(max, other_max);
    const float reference = new_max == -kInfinity ? 0 : new_max * kLog2e;
    sum = sum * Exp2(fmaf(max, kLog2e, -reference)) +
          other_sum * Exp2(fmaf(other_max, kLog2e, -reference));
    max = new_max;
  }
};

// The mean key of the blocks of a tile, by one warpgroup: a row of ones times the keys, 16 channels
// at a time. Keys beyond the end of the sequence are multiplied by zero.
template <typename T, int kHeadDim>
__device__ void WriteKeyMeans(const FlexPrefill& f, const Sequence& s, int kv_head, int first_key,
                              const char* tile) {
  const Problem& p = f.problem;
  constexpr uint32_t kOne = std::is_same_v<T, __nv_bfloat16> ? 0x3f80 : 0x3c00;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (int begin = 0; begin < kKeys; begin += p.block_size) {
    const int tokens = min(p.block_size, s.sk - first_key - begin);
    if (tokens <= 0) return;
    const int64_t row = kv_head * p.rows + s.row_begin + (first_key + begin) / p.block_size;
#pragma unroll 1
    for (int pair = warp; pair < kHeadDim / 16; pair += 4) {
      float lower[4] = {}, upper[4] = {};  // 8 channels each
#pragma unroll 4
      for (int key = 0; key < p.block_size; key += 16) {
        uint32_t keys[4], ones[4];
        LoadTransposed(keys, SharedAddress(tile) + PieceOffset<uint32_t>(begin + key + lane % 16,
                                                                         2 * pair + lane / 16,
                                                                         kKeys * kRowBytes));
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const int at = key + 8 * x + lane % 4 * 2;
          ones[2 * x] = ones[2 * x + 1] =
              (at < tokens ? kOne : 0) | (at + 1 < tokens ? kOne << 16 : 0);
        }
        Mma<T>(lower, ones, keys[0], keys[1]);
        Mma<T>(upper, ones, keys[2], keys[3]);
      }
      if (lane < 4) {  // all rows of the product are alike
        const auto number = static_cast<float>(tokens);
        float* const out = f.key_mean + row * kHeadDim + 16 * pair + 2 * lane;
        *reinterpret_cast<float2*>(out) = make_float2(lower[0] / number, lower[1] / number);
        *reinterpret_cast<float2*>(out + 8) = make_float2(upper[0] / number, upper[1] / number);
      }
    }
  }
}

// One thread block takes up to 8 tiles of 64 probe rows that share a kv head, keeps them in shared
// memory, and streams a chunk of keys past them. Rows of the product are probe rows, so that a
// thread keeps the running maximum and sum of its own keys of two rows a tile and no thread speaks
// to another until the end.
// Bytes: K once. FLOPs: 2 * block_size * d a key and query head. At 128K tokens, 32/8/128: 268 MB,
// 64 us; 1.4e11 FLOPs, 180 us at 780 TFLOP/s; 5.4e8 exponentials at 16 a clock, 145 us.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(512, 1) RowSumsKernel(FlexPrefill f, Shape shape) {
  extern __shared__ __align__(1024) char shared[];
  const Problem& p = f.problem;
  const Sequence s = p.sequence[blockIdx.z];
  const int begin = blockIdx.x * f.chunk_blocks * p.block_size;
  if (f.IsShort(s) || begin >= s.sk) return;
  const int keys = min(f.chunk_blocks * p.block_size, s.sk - begin);
  const int tiles = (keys + kKeys - 1) / kKeys;

  const int heads_of_group = p.q_heads / p.kv_heads;
  const int halves = p.block_size / 64;           // row tiles of a head, 1 or 2
  const int row_tiles = heads_of_group * halves;  // of the kv head
  const int parts = (row_tiles + shape.row_tiles - 1) / shape.row_tiles;
  const int kv_head = blockIdx.y / parts;
  const int first_row_tile = blockIdx.y % parts * shape.row_tiles;
  const int first_row = s.sk - p.block_size;  // token of probe row 0

  constexpr int kQueryBytes = TileBytes(64, kHeadDim), kStageBytes = TileBytes(kKeys, kHeadDim);
  char* const keys_at = shared + shape.row_tiles * kQueryBytes;
  auto* const barriers = reinterpret_cast<RingBarriers*>(keys_at + shape.stages * kStageBytes);
  KeyRing<kHeadDim> ring(barriers, keys_at, shape.stages, kStageBytes);
  if (threadIdx.x == 0) ring.Init();
  __syncthreads();

  const auto load = [&](int tile) {
    ring.Load(p, s, kv_head, kKeys,
              [&](int row) { return min(begin + tile * kKeys + row, s.sk - 1); });
  };
  for (int tile = 0; tile < min(ring.Ahead(), tiles); ++tile) load(tile);
  const auto head_of = [&](int row_tile) {
    return kv_head * heads_of_group + (halves == 2 ? row_tile / 2 : row_tile);
  };
  const auto row_of = [&](int row_tile) { return halves == 2 ? row_tile % 2 * 64 : 0; };
  LoadQueries<T, kHeadDim>(
      min(shape.row_tiles, row_tiles - first_row_tile), 64,
      [&](int x, int row) {
        const int row_tile = first_row_tile + x;
        return QueryRow<uint16_t>(p, s, head_of(row_tile), first_row + row_of(row_tile) + row);
      },
      shared);
#if PREFILLD_HAS_WGMMA
  FenceAsyncProxy();
#endif
  __syncthreads();

  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int own_tiles = shape.row_tiles / shape.warpgroups;
  const int row_in_tile = threadIdx.x / 32 % 4 * 16 + lane / 4;
  int means_at = warpgroup;  // the next tile whose mean keys this warpgroup writes
  // [row tile, row_in_tile + {0, 8}]. Of two dimensions, nvcc 13.0 would leave the maxima of the
  // second tile zero: it gives members their initial values in the first row of such an array only.
  Softmax softmax[4];
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + ring.Ahead() < tiles) load(tile + ring.Ahead());
    const char* key_tile = ring.Wait();
    const int first_key = begin + tile * kKeys;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      if (x >= own_tiles) continue;
      const int own = warpgroup * own_tiles + x, row_tile = first_row_tile + own;
      float c[kColumns / 2];
      Multiply<T, kHeadDim, kColumns>(c, shared + own * kQueryBytes, 64 * kRowBytes, key_tile,
                                      kKeys * kRowBytes);
      if (row_tile >= row_tiles) continue;
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) c[i] = RoundToBFloat16(c[i]);
      if (first_key + kKeys - 1 > first_row) {
        const int token = first_row + row_of(row_tile) + row_in_tile;
        const int last = token - first_key - lane % 4 * 2;  // of the columns that row sees
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
          c[i] = i / 4 * 8 + i % 2 > last + i / 2 % 2 * 8 ? -kInfinity : c[i];
        }
      }
      softmax[2 * x].Add(c, 0);
      softmax[2 * x + 1].Add(c, 1);
    }
    if (first_row_tile == 0 && means_at == tile) {
      WriteKeyMeans<T, kHeadDim>(f, s, kv_head, first_key, key_tile);
      means_at += shape.warpgroups;
    }
    ring.Done();
  }

#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int row_tile = first_row_tile + warpgroup * own_tiles + x;
    if (x >= own_tiles || row_tile >= row_tiles) continue;
    const int64_t head = static_cast<int64_t>(blockIdx.z) * p.q_heads + head_of(row_tile);
    float2* const out =
        f.row_sums + (head * f.chunks + blockIdx.x) * p.block_size + row_of(row_tile) + row_in_tile;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Softmax& row = softmax[2 * x + half];
      for (int step = 1; step < 4; step *= 2) {
        row.Merge(__shfl_xor_sync(~0u, row.max, step), __shfl_xor_sync(~0u, row.sum, step));
      }
      if (lane % 4 == 0) out[half * 8] = make_float2(row.max, row.sum);
    }
  }
}

// The largest thread block that the device has room for; `rows` row tiles are wanted.
Shape FindShape(const Problem& p, int rows) {
  const int limit = SharedMemoryLimit() - static_cast<int>(sizeof(RingBarriers));
  const int stage_bytes = TileBytes(kKeys, p.head_dim), query_bytes = TileBytes(64, p.head_dim);
  for (int row_tiles = rows >= 5 ? 8 : rows >= 3 ? 4 : rows; row_tiles > 1; row_tiles /= 2) {
    const int stages = std::min((limit - row_tiles * query_bytes) / stage_bytes, 3);
    if (stages >= 2) return {row_tiles, std::min(row_tiles, 4), stages};
  }
  return {1, 1, 1};
}

}  // namespace

cudaError_t FlexPrefillRowSums(FlexPrefill* f, int multiprocessors, cudaStream_t stream) {
  const Problem& p = f->problem;
  if (PlainTable::Has(p.dtype, p.head_dim)) {
    return FlexPrefillRowSumsF32(f, multiprocessors, stream);
  }
  const int rows = p.q_heads / p.kv_heads * (p.block_size / 64);
  const Shape shape = FindShape(p, rows);
  const int lanes = p.kv_heads * ((rows + shape.row_tiles - 1) / shape.row_tiles);
  const ChunkPlan plan = PlanChunks(p, kKeys / p.block_size, lanes, multiprocessors);
  f->chunk_blocks = plan.blocks;
  f->chunks = plan.chunks;
  const int bytes = shape.row_tiles * TileBytes(64, p.head_dim) +
                    shape.stages * TileBytes(kKeys, p.head_dim) +
                    static_cast<int>(sizeof(RingBarriers));
  return FlexPrefillTable::Launch(p.dtype, p.head_dim, [&]<typename T, int kHeadDim>() {
    const cudaError_t error = cudaFuncSetAttribute(
        RowSumsKernel<T, kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(plan.chunks, lanes, p.sequences);
    RowSumsKernel<T, kHeadDim><<<grid, shape.warpgroups * 128, bytes, stream>>>(*f, shape);
    return cudaGetLastError();
  });
}

}  // namespace prefilld::cuda
