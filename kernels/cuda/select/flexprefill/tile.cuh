// Logits of the last rows of a prompt: the shared memory, the ring that keys come through and the
// product, for the two passes of FlexPrefill.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/instructions/barrier.cuh"
#include "kernels/cuda/instructions/cp_async.cuh"
#include "kernels/cuda/instructions/mma.cuh"
#include "kernels/cuda/instructions/wgmma.cuh"
#include "kernels/cuda/pages.cuh"
#include "kernels/cuda/select/flexprefill/flexprefill.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PREFILLD_HAS_WGMMA 1
#else
#define PREFILLD_HAS_WGMMA 0
#endif

namespace prefilld::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int SlabCount(int head_dim) { return (head_dim + 63) / 64; }
__host__ __device__ constexpr int TileBytes(int rows, int head_dim) {
  return SlabCount(head_dim) * rows * kRowBytes;
}

// The nearest bf16, ties to even, as a float: the packing conversion beside a zero.
__device__ __forceinline__ float RoundToBFloat16(float x) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(x), "f"(0.0f));
  return __uint_as_float(bits);
}

template <typename T>
__device__ __forceinline__ void Widen8(const uint4& piece, float (&x)[8]) {
  const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

// 1 / sqrt d in two floats, so that the product is rounded once: the quotient of
// docs/sparse-attention.md, section 2, step 1.
struct QueryScale {
  float high, low;
};
__host__ __device__ constexpr QueryScale ScaleOf(int head_dim) {
  const double scale = InverseRoot(head_dim);
  const float high = static_cast<float>(scale);
  return {high, static_cast<float>(scale - high)};
}
__device__ __forceinline__ float ScaleQuery(float x, QueryScale scale) {
  return RoundToBFloat16(fmaf(x, scale.high, x * scale.low));
}
// Two of them as T. fp16 holds a bf16 down to 2^-17 exactly; what is smaller is off by at most
// 2^-25.
template <typename T>
__device__ __forceinline__ uint32_t ScaleQueries(float first, float second, QueryScale scale) {
  const float low = ScaleQuery(first, scale), high = ScaleQuery(second, scale);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Fills `tiles` tiles of `rows` rows with queries, scaled and rounded to bf16; row r of tile x is
// row_of(x, r). The caller synchronises.
template <typename T, int kHeadDim, typename RowOf>
__device__ __forceinline__ void LoadQueries(int tiles, int rows, RowOf row_of, char* to) {
  constexpr int kAtOnce = 8;  // loads in flight of a thread
  constexpr int kPieces = kHeadDim / 8;
  static_assert(InverseRoot(kHeadDim) > 0, "list 1 / sqrt of this head_dim");
  constexpr QueryScale scale = ScaleOf(kHeadDim);
  const int pieces = tiles * rows * kPieces;
  for (int i = threadIdx.x; i < pieces; i += kAtOnce * blockDim.x) {
    uint4 loaded[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = i + k * blockDim.x, row = at / kPieces;
      if (at < pieces) {
        loaded[k] = reinterpret_cast<const uint4*>(row_of(row / rows, row % rows))[at % kPieces];
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = i + k * blockDim.x, row = at / kPieces;
      float x[8];
      Widen8<T>(loaded[k], x);
      uint32_t word[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) word[c] = ScaleQueries<T>(x[2 * c], x[2 * c + 1], scale);
      if (at < pieces) {
        *reinterpret_cast<uint4*>(
            to + row / rows * TileBytes(rows, kHeadDim) +
            PieceOffset<uint32_t>(row % rows, at % kPieces, rows * kRowBytes)) =
            make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

// ---- the softmax of a row -----------------------------------------------------------------------
// What is less than e^-87.05 of the largest is zero (docs/sparse-attention.md, section 2, step 1):
// exponents are lowered by this much, so that the exponential underflows there. (87.05 lies between
// -87 and the next logit, whatever the rounding.)
constexpr float kLowered = 0.41339f;  // 126 - 87.05 log2 e

// What a row of the probe has to know: exp2(logit * log2 e - subtract) * weight is its probability.
struct RowConstants {
  float subtract, weight;
};

// The softmax of rows [0, block_size) of a head from its pieces. Rows that hold NaN or infinity
// have weight zero and say nothing.
__device__ inline RowConstants CombineRow(const FlexPrefill& f, const Sequence& s, int64_t head,
                                          int row) {
  const int B = f.problem.block_size;
  const float2* piece = f.row_sums + head * f.chunks * B + row;
  const int keys = f.chunk_blocks * B;
  const int chunks = (s.sk + keys - 1) / keys;
  constexpr int kAtOnce = 16;  // loads in flight
  float max = -kInfinity, sum = 0;
#pragma unroll 1
  for (int begin = 0; begin < chunks; begin += kAtOnce) {
    float2 part[kAtOnce];
    float new_max = max;
#pragma unroll
    for (int x = 0; x < kAtOnce; ++x) {
      part[x] = begin + x < chunks ? piece[static_cast<int64_t>(begin + x) * B]
                                   : make_float2(-kInfinity, 0);
    }
#pragma unroll
    for (int x = 0; x < kAtOnce; ++x) new_max = fmaxf(new_max, part[x].x);
    const float reference = new_max == -kInfinity ? 0 : new_max;
    sum *= Exp2((max - reference) * kLog2e);
#pragma unroll
    for (int x = 0; x < kAtOnce; ++x) sum += part[x].y * Exp2((part[x].x - reference) * kLog2e);
    max = new_max;
  }
  if (!(sum > 0) || !(sum < kInfinity)) return {0, 0};
  return {fmaf(max, kLog2e, kLowered),
          kMassScale * exp2f(kLowered) / (sum * static_cast<float>(B))};
}

// ---- the ring ---------------------------------------------------------------------------------
// Tiles of keys pass through `stages` places. All threads copy a part of every tile (cp.async) and
// all warps read it; a place is filled again once every warp has said that it is done with it. From
// three places on one is left idle: warps may then be two tiles apart, and some compute
// exponentials while others multiply.
constexpr int kMaxStages = 8;
struct RingBarriers {
  uint64_t full[kMaxStages], empty[kMaxStages];
};

__device__ __forceinline__ void WaitParity(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  BarrierWait(barrier, parity);
#else
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

template <int kHeadDim>
class KeyRing {
 public:
  __device__ KeyRing(RingBarriers* barriers, char* data, int stages, int stage_bytes)
      : barriers_(barriers), data_(data), stages_(stages), stage_bytes_(stage_bytes) {}

  // By one thread, before a __syncthreads.
  __device__ void Init() {
#pragma unroll 1
    for (int x = 0; x < stages_; ++x) {
      BarrierInit(&barriers_->full[x], blockDim.x);
      BarrierInit(&barriers_->empty[x], blockDim.x / 32);
    }
  }
  // How many tiles are asked for before the first is used.
  __device__ int Ahead() const { return stages_ > 2 ? stages_ - 2 : stages_ - 1; }

  // Copies this thread's part of the next tile: rows of keys, row r being token_of(r).
  template <typename TokenOf>
  __device__ __forceinline__ void Load(const Problem& p, const Sequence& s, int kv_head, int rows,
                                       TokenOf token_of) {
    // The first time round nothing is there to wait for: the phase before the first has ended.
    WaitParity(&barriers_->empty[load_.place], load_.parity ^ 1);
    const uint32_t to = SharedAddress(data_ + load_.place * stage_bytes_);
    constexpr int kLanes = kHeadDim > 128 ? 32 : kHeadDim > 64 ? 16 : 8;  // threads to a row
    const int piece = threadIdx.x % kLanes;
    for (int row = threadIdx.x / kLanes; row < rows; row += blockDim.x / kLanes) {
      if (piece >= kHeadDim / 8) continue;
      const uint16_t* from = KeyRow<uint16_t>(p, s, kv_head, token_of(row)) + piece * 8;
      CopyAsyncOfLine(to + PieceOffset<uint32_t>(row, piece, rows * kRowBytes), from);
    }
    CopyAsyncArrive(&barriers_->full[load_.place]);
    Advance(&load_);
  }

  // Waits for the next tile. PTX asks for a proxy fence between what cp.async wrote and the reads
  // of wgmma. There is none, as in CUTLASS's pipelines of cp.async for wgmma: on 9.0, the only chip
  // with wgmma, what has arrived at the barrier is in shared memory, and a fence would wait for the
  // copies under way. On later chips tensor cores have been seen to read too early without it.
  __device__ __forceinline__ const char* Wait() {
    WaitParity(&barriers_->full[use_.place], use_.parity);
    return data_ + use_.place * stage_bytes_;
  }
  // By every warp, when it has read that tile.
  __device__ __forceinline__ void Done() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(&barriers_->empty[use_.place]);
    Advance(&use_);
  }

 private:
  struct Position {
    int place = 0;
    uint32_t parity = 0;
  };
  __device__ __forceinline__ void Advance(Position* position) {
    if (++position->place < stages_) return;
    position->place = 0;
    position->parity ^= 1;
  }

  RingBarriers* barriers_;
  char* data_;
  int stages_, stage_bytes_;
  Position load_, use_;
};

// ---- the product ------------------------------------------------------------------------------
// c = A B^T for the 64 rows of tile a and the kColumns rows of tile b, by four warps. Warp w of the
// four has rows 16 w to 16 w + 15; of these c[4 i + 2 x + e] is row lane / 4 + 8 x and column
// 8 i + 2 (lane % 4) + e. Slabs of a and b are a_slab and b_slab bytes apart.
#if PREFILLD_HAS_WGMMA

template <typename T, int kHeadDim, int kColumns>
__device__ __forceinline__ void Multiply(float (&c)[kColumns / 2], const char* a, int a_slab,
                                         const char* b, int b_slab) {
  const Matrix a_at(a, 16), b_at(b, 16);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    WgmmaQk<T>(c, a_at.Descriptor(k / 4 * a_slab + k % 4 * 32),
               b_at.Descriptor(k / 4 * b_slab + k % 4 * 32), k > 0);
  }
  WgmmaCommit();
  WgmmaWait<0>();
}

#else

template <typename T, int kHeadDim, int kColumns>
__device__ __forceinline__ void Multiply(float (&c)[kColumns / 2], const char* a, int a_slab,
                                         const char* b, int b_slab) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int a_row = 16 * warp + lane % 16, a_piece = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_piece = lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) c[i] = 0;
  for (int channel = 0; channel < kHeadDim; channel += 16) {
    const int slab = channel / 64, piece = channel % 64 / 8;
    uint32_t x[4];
    LoadMatrices(
        x, SharedAddress(a + slab * a_slab) + PieceOffset<uint32_t>(a_row, piece + a_piece, 0));
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t y[4];
      LoadMatrices(y, SharedAddress(b + slab * b_slab) +
                          PieceOffset<uint32_t>(16 * i + b_row, piece + b_piece, 0));
      Mma<T>(c + 8 * i, x, y[0], y[1]);
      Mma<T>(c + 8 * i + 4, x, y[2], y[3]);
    }
  }
}

#endif

}  // namespace prefilld::cuda
