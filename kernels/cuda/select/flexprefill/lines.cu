// FlexPrefill, second pass over K: how much of the probe rows' softmax lies on every key (a_v) and
// on every diagonal (a_s).
#include "kernels/cuda/select/flexprefill/tile.cuh"

namespace prefilld::cuda {
namespace {

// Keys of a tile: 16 of each of four key blocks, a block a warp.
constexpr int kKeys = 64;
constexpr int kBlocks = 4;

struct Shape {
  int heads;   // of a thread block, a warpgroup each
  int stages;  // of the ring of keys
  int groups;  // of four key blocks, in a thread block
};

// Sums along diagonals within a warp. A warp has key k = 16 t + 8 x + a of its block at step t,
// lane a = lane / 4, x 0 or 1, and row r = 8 i + 2 b + e, b = lane % 4, e 0 or 1. Diagonal y = k +
// kRows - 1 - r is 8 u + a + 7 - 2 b - e with u = 2 t + x + kRows / 8 - 1 - i: to a thread there
// are kRows / 8 + 1 values of u at a step, two of which are complete after it. Those are brought
// together across lanes: 16 diagonals, in the same order of additions wherever they lie.
template <int kRows>
struct Diagonals {
  static constexpr int kOpen = kRows / 8 - 1;
  float open[2][kOpen] = {};  // [e][u - 2 t], before step t
  float last[2] = {};         // [e], of u = 2 t - 1

  // Diagonals 8 u + {0..15} for u = 2 t from a thread's sums of u and u + 1: diagonal
  // 8 (b % 2) + lane / 4 of them, in lanes b and b ^ 2.
  __device__ __forceinline__ float Gather(const float (&first)[2], const float (&second)[2]) {
    const int lane = threadIdx.x % 32, a = lane / 4, b = lane % 4;
    float lower = 0, upper = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool same = a <= 2 * b + e;  // else it belongs to the next u
      const int source = ((a + 1 + 2 * b + e) & 7) * 4 + b;
      lower += __shfl_sync(~0u, same ? first[e] : last[e], source);
      upper += __shfl_sync(~0u, same ? second[e] : first[e], source);
      last[e] = second[e];
    }
    float own = b & 1 ? upper : lower;
    own += __shfl_xor_sync(~0u, b & 1 ? lower : upper, 1);
    return own + __shfl_xor_sync(~0u, own, 2);
  }
};

// One thread block takes up to 4 query heads of a kv head, a warpgroup each, and streams the keys
// of its groups of four blocks past them. Rows of the product are keys: a thread has two keys and
// 32 rows at a step, so it adds most of a column and of a diagonal in registers. Each warp walks
// along one key block, 16 keys a step, so that its diagonals stay with it; a block's diagonals end
// in two parts, which are added where they are read. Every block is summed in the same order: equal
// scores stay equal, and ties fall to the lower index.
// Bytes: K once, 12 a key and query head written. FLOPs and exponentials: as the first pass. At
// 128K tokens, 32/8/128: 318 MB, 80 us; 180 us at 780 TFLOP/s; exponentials 145 us.
template <typename T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(512, 1) LinesKernel(FlexPrefill f, Shape shape) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int kSteps = kRows / 16;
  const Problem& p = f.problem;
  const Sequence s = p.sequence[blockIdx.z];
  const int first_block = blockIdx.x * shape.groups * kBlocks;
  if (f.IsShort(s) || first_block >= s.k_blocks) return;
  const int blocks = min(shape.groups * kBlocks, s.k_blocks - first_block);
  const int tiles = (blocks + kBlocks - 1) / kBlocks * kSteps;
  const int heads_of_group = p.q_heads / p.kv_heads;
  const int parts = (heads_of_group + shape.heads - 1) / shape.heads;
  const int kv_head = blockIdx.y / parts;
  const int first_head = blockIdx.y % parts * shape.heads;  // within the group
  const int heads = min(shape.heads, heads_of_group - first_head);
  const int first_row = s.sk - kRows;

  constexpr int kQueryBytes = TileBytes(kRows, kHeadDim), kStageBytes = TileBytes(kKeys, kHeadDim);
  char* const keys_at = shared + shape.heads * kQueryBytes;
  auto* const constants =
      reinterpret_cast<RowConstants*>(keys_at + shape.stages * kStageBytes);  // [heads, kRows]
  auto* const barriers = reinterpret_cast<RingBarriers*>(constants + shape.heads * kRows);
  auto* const silent_rows = reinterpret_cast<int*>(barriers + 1);  // [heads]
  KeyRing<kHeadDim> ring(barriers, keys_at, shape.stages, kStageBytes);
  if (threadIdx.x == 0) ring.Init();
  if (threadIdx.x < shape.heads) silent_rows[threadIdx.x] = 0;
  __syncthreads();

  const auto load = [&](int tile) {
    ring.Load(p, s, kv_head, kKeys, [&](int row) {
      const int block = first_block + tile / kSteps * kBlocks + row / 16;
      return min(block * kRows + tile % kSteps * 16 + row % 16, s.sk - 1);
    });
  };
  for (int tile = 0; tile < min(ring.Ahead(), tiles); ++tile) load(tile);
  const int group_begin = kv_head * heads_of_group + first_head;
  LoadQueries<T, kHeadDim>(
      heads, kRows,
      [&](int x, int row) { return QueryRow<uint16_t>(p, s, group_begin + x, first_row + row); },
      shared);
  for (int x = threadIdx.x; x < heads * kRows; x += blockDim.x) {
    const int64_t head = static_cast<int64_t>(blockIdx.z) * p.q_heads + group_begin + x / kRows;
    constants[x] = CombineRow(f, s, head, x % kRows);
    if (constants[x].weight == 0) silent_rows[x / kRows] = 1;
  }
#if PREFILLD_HAS_WGMMA
  FenceAsyncProxy();
#endif
  __syncthreads();

  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int a = lane / 4, b = lane % 4;
  const bool has_head = warpgroup < heads;
  const bool any_silent = has_head && silent_rows[warpgroup] != 0;
  const RowConstants* const row_constants = constants + warpgroup * kRows + 2 * b;
  const int64_t head_rows = (group_begin + warpgroup) * p.rows + s.row_begin;
  Diagonals<kRows> diagonals;
  float block_vertical = 0, block_diagonal = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + ring.Ahead() < tiles) load(tile + ring.Ahead());
    const char* key_tile = ring.Wait();
    float c[kRows / 2];
    Multiply<T, kHeadDim, kRows>(c, key_tile, kKeys * kRowBytes, shared + warpgroup * kQueryBytes,
                                 kRows * kRowBytes);
    ring.Done();
    if (!has_head) continue;

    const int step = tile % kSteps;
    const int block = first_block + tile / kSteps * kBlocks + warp;
    const int key = block * kRows + step * 16 + a;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) c[i] = RoundToBFloat16(c[i]);
    if (block * kRows + kRows - 1 > first_row) {
      const int first = key - first_row - 2 * b;  // of the rows that see the key
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        c[i] = i / 4 * 8 + i % 2 < first + i / 2 % 2 * 8 ? -kInfinity : c[i];
      }
    }
    if (any_silent) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        c[i] = row_constants[i / 4 * 8 + i % 2].weight == 0 ? -kInfinity : c[i];
      }
    }

    float column[2][2] = {};       // [x][e]
    float sums[2][kRows / 8 + 1];  // [e][u - 2 t]
    sums[0][0] = diagonals.open[0][0];
    sums[1][0] = diagonals.open[1][0];
#pragma unroll
    for (int i = kRows / 8 - 1; i >= 0; --i) {  // ascending u
      const float4 constant = *reinterpret_cast<const float4*>(row_constants + 8 * i);
      const float subtract[2] = {constant.x, constant.z}, weight[2] = {constant.y, constant.w};
      const int u = kRows / 8 - 1 - i;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float lower = Exp2(fmaf(c[4 * i + e], kLog2e, -subtract[e]));
        const float upper = Exp2(fmaf(c[4 * i + 2 + e], kLog2e, -subtract[e]));
        column[0][e] = fmaf(lower, weight[e], column[0][e]);
        column[1][e] = fmaf(upper, weight[e], column[1][e]);
        sums[e][u] = fmaf(lower, weight[e], sums[e][u]);
        sums[e][u + 1] = u + 1 < Diagonals<kRows>::kOpen
                             ? fmaf(upper, weight[e], diagonals.open[e][u + 1])
                             : upper * weight[e];
      }
    }

    const int64_t block_at = head_rows + block;
    const bool writes = block < s.k_blocks && b < 2;
    const int at = 8 * b + a;  // of 16 keys or diagonals
    const float lower = column[0][0] + column[0][1], upper = column[1][0] + column[1][1];
    float keys = b & 1 ? upper : lower;
    keys += __shfl_xor_sync(~0u, b & 1 ? lower : upper, 1);
    keys += __shfl_xor_sync(~0u, keys, 2);
    if (writes) f.vertical[block_at * kRows + step * 16 + at] = keys;
    block_vertical += keys;

    const float first[2] = {sums[0][0], sums[1][0]}, second[2] = {sums[0][1], sums[1][1]};
    const float complete = diagonals.Gather(first, second);
    if (writes) f.diagonal[block_at * kRows + step * 16 + at] = complete;
    block_diagonal += complete;
#pragma unroll
    for (int u = 0; u < Diagonals<kRows>::kOpen; ++u) {
      diagonals.open[0][u] = sums[0][u + 2];
      diagonals.open[1][u] = sums[1][u + 2];
    }
    if (step < kSteps - 1) continue;

    // The block ends: what is still open is the second part.
    float block_diagonal_next = 0;
#pragma unroll
    for (int u = 0; u < kRows / 8; u += 2) {
      const bool more = u + 1 < Diagonals<kRows>::kOpen;
      const float first[2] = {diagonals.open[0][u], diagonals.open[1][u]};
      const float second[2] = {more ? diagonals.open[0][u + 1] : 0,
                               more ? diagonals.open[1][u + 1] : 0};
      const float next = diagonals.Gather(first, second);
      if (writes) f.diagonal_next[block_at * kRows + u * 8 + at] = next;
      block_diagonal_next += next;
    }
    for (int mask : {1, 4, 8, 16}) {
      block_vertical += __shfl_xor_sync(~0u, block_vertical, mask);
      block_diagonal += __shfl_xor_sync(~0u, block_diagonal, mask);
      block_diagonal_next += __shfl_xor_sync(~0u, block_diagonal_next, mask);
    }
    if (lane == 0 && block < s.k_blocks) {
      f.block_vertical[block_at] = block_vertical;
      f.block_diagonal[block_at] = block_diagonal;
      f.block_diagonal_next[block_at] = block_diagonal_next;
    }
    block_vertical = block_diagonal = 0;
    diagonals = Diagonals<kRows>();
  }
}

int SharedBytes(const Problem& p, int heads, int stages) {
  return heads * TileBytes(p.block_size, p.head_dim) + stages * TileBytes(kKeys, p.head_dim) +
         heads * p.block_size * static_cast<int>(sizeof(RowConstants)) +
         static_cast<int>(sizeof(RingBarriers)) + heads * static_cast<int>(sizeof(int));
}

template <typename T, int kHeadDim, int kRows>
cudaError_t Launch(const FlexPrefill& f, const Shape& shape, dim3 grid, cudaStream_t stream) {
  const int bytes = SharedBytes(f.problem, shape.heads, shape.stages);
  const cudaError_t error = cudaFuncSetAttribute(
      LinesKernel<T, kHeadDim, kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  LinesKernel<T, kHeadDim, kRows><<<grid, shape.heads * 128, bytes, stream>>>(f, shape);
  return cudaGetLastError();
}

}  // namespace

cudaError_t FlexPrefillLines(const FlexPrefill& f, int multiprocessors, cudaStream_t stream) {
  const Problem& p = f.problem;
  if (PlainTable::Has(p.dtype, p.head_dim)) return FlexPrefillLinesF32(f, stream);
  const int group = p.q_heads / p.kv_heads, limit = SharedMemoryLimit();
  // A step takes one warpgroup about as long as four, which hide each other's latency; so four
  // heads, which read K once, unless the prompt is so short that fewer occupy more of the device.
  Shape shape = {1, 1, 0};
  ChunkPlan best = {};
  int lanes = 0;
  for (int heads : {4, 2, 1}) {
    if (heads >= 2 * group) continue;
    int stages = 6;
    while (stages > 1 && SharedBytes(p, heads, stages) > limit) --stages;
    if (heads > 1 && (stages < 3 || SharedBytes(p, heads, stages) > limit)) continue;
    const int thread_blocks = p.kv_heads * ((group + heads - 1) / heads);
    ChunkPlan plan = PlanChunks(p, kBlocks, thread_blocks, multiprocessors);
    plan.time *= 1 + 0.05 * heads;
    if (lanes > 0 && plan.time >= best.time) continue;
    best = plan;
    lanes = thread_blocks;
    shape = {heads, stages, plan.blocks / kBlocks};
  }
  const dim3 grid(best.chunks, lanes, p.sequences);
  return FlexPrefillTable::Launch(p.dtype, p.head_dim, [&]<typename T, int kHeadDim>() {
    return p.block_size == 64 ? Launch<T, kHeadDim, 64>(f, shape, grid, stream)
                              : Launch<T, kHeadDim, 128>(f, shape, grid, stream);
  });
}

}  // namespace prefilld::cuda
