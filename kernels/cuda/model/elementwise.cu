// Roofline: HBM. Every thread moves eight values at a time, but for the turning of heads, whose
// pairs lie apart: there a lane moves two neighbours.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/instructions/overlap.cuh"
#include "kernels/cuda/model/elementwise.h"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnit = kWidthUnit;  // values that a thread moves at a time

// kUnit values: 16 bytes, or 32 of F32.
template <typename T>
struct Unit {
  uint4 part[kUnit * sizeof(T) / sizeof(uint4)];
};

template <typename T>
__device__ __forceinline__ void Widen(const Unit<T>& unit, float (&out)[kUnit]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = reinterpret_cast<const float*>(unit.part)[i];
  } else {
    const uint4 x = unit.part[0];
    const uint32_t words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = Unpack<T>(words[i]);
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ Unit<T> Narrow(const float (&x)[kUnit]) {
  if constexpr (std::is_same_v<T, float>) {
    return {{{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
              __float_as_uint(x[3])},
             {__float_as_uint(x[4]), __float_as_uint(x[5]), __float_as_uint(x[6]),
              __float_as_uint(x[7])}}};
  } else {
    return {{{Pack<T>(x[0], x[1]), Pack<T>(x[2], x[3]), Pack<T>(x[4], x[5]), Pack<T>(x[6], x[7])}}};
  }
}

// Two neighbouring values.
template <typename T>
__device__ __forceinline__ float2 LoadTwo(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<const float2&>(*from);
  } else {
    return Unpack<T>(reinterpret_cast<const uint32_t&>(*from));
  }
}
template <typename T>
__device__ __forceinline__ void StoreTwo(T* to, float2 x) {
  if constexpr (std::is_same_v<T, float>) {
    reinterpret_cast<float2&>(*to) = x;
  } else {
    reinterpret_cast<uint32_t&>(*to) = Pack<T>(x.x, x.y);
  }
}

template <typename T>
__device__ __forceinline__ T* RowOf(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// The calls' dtype becomes a type.
template <typename Launch>
cudaError_t ByType(DType dtype, const Launch& launch) {
  if (dtype == DType::kF32) {
    launch(float{});
  } else if (dtype == DType::kBF16) {
    launch(__nv_bfloat16{});
  } else {
    launch(__half{});
  }
  return cudaGetLastError();
}

// A block a token.
template <typename T>
__global__ void __launch_bounds__(kThreads) EmbedKernel(const __grid_constant__ EmbedCall call) {
  const int64_t id = min(static_cast<int64_t>(call.ids[blockIdx.x]), call.vocabulary - 1);
  const int64_t units = call.width / kUnit;
  const auto* from = static_cast<const Unit<T>*>(call.table) + id * units;
  auto* to = reinterpret_cast<Unit<T>*>(RowOf<T>(call.out, blockIdx.x));
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

// A block a token; a thread holds kHeld units of the row, so that it is read once.
constexpr int kNormThreadsMax = 1024, kHeld = 4;

template <typename T>
__global__ void __launch_bounds__(kNormThreadsMax)
    NormKernel(const __grid_constant__ NormCall call) {
  AwaitBefore();
  const int units = static_cast<int>(call.width / kUnit);
  const auto* from = reinterpret_cast<const Unit<T>*>(RowOf<T>(call.x, blockIdx.x));
  Unit<T> held[kHeld];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int unit = threadIdx.x + i * blockDim.x;
    if (unit >= units) break;
    held[i] = from[unit];
    float x[kUnit];
    Widen<T>(held[i], x);
#pragma unroll
    for (float value : x) squares += value * value;
  }
  __shared__ float sums[kNormThreadsMax / 32];
  squares = WarpSum(squares);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
  __syncthreads();
  const int warps = blockDim.x / 32;
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += sums[w];
  const float scale = rsqrtf(sum / static_cast<float>(call.width) + call.eps);
  auto* to = reinterpret_cast<Unit<T>*>(RowOf<T>(call.out, blockIdx.x));
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int unit = threadIdx.x + i * blockDim.x;
    if (unit >= units) break;
    float x[kUnit];
    Widen<T>(held[i], x);
    const auto* weight = reinterpret_cast<const float4*>(call.weight) + 2 * unit;
    const float4 low = weight[0], high = weight[1];
    const float w[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int c = 0; c < kUnit; ++c) x[c] *= scale * w[c];
    to[unit] = Narrow<T>(x);
  }
}

// Once a batch, not once a layer: sincosf of angles up to a million takes its slow path.
__global__ void __launch_bounds__(kThreads) TurnsKernel(const __grid_constant__ TurnsCall call) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= call.tokens * call.pairs) return;
  const float position = static_cast<float>(call.positions[at / call.pairs]);
  float sine, cosine;
  sincosf(__fmul_rn(position, call.inverse[at % call.pairs]), &sine, &cosine);
  call.turns[at] = {cosine * call.scale, sine * call.scale};
}

// One head of one token, by a warp.
struct TurnedHead {
  const float* norm;  // or null
  float eps;
  int head_dim, pairs;
  bool interleaved;
  const float2* turns;  // of the token
};

constexpr int kPairSteps = 2;  // of 64 pairs a warp: head_dim 256

// Two neighbouring pairs: their channels are a, a + 1 and b, b + 1.
struct Pairs {
  int a, b;
};
__device__ __forceinline__ Pairs PairsOf(const TurnedHead& head, int pair) {
  if (head.interleaved) return {2 * pair, 2 * pair + 2};
  return {pair, pair + head.pairs};
}

template <typename T>
__device__ void TurnHead(const TurnedHead& head, const T* from, T* to) {
  const int lane = threadIdx.x % 32;
  const auto load = [&](int c) { return LoadTwo(from + c); };
  const auto store = [&](int c, float2 x) { StoreTwo(to + c, x); };
  float scale = 1;
  if (head.norm != nullptr) {
    float squares = 0;
    for (int c = 2 * lane; c < head.head_dim; c += 64) {
      const float2 x = load(c);
      squares += x.x * x.x + x.y * x.y;
    }
    scale = rsqrtf(WarpSum(squares) / static_cast<float>(head.head_dim) + head.eps);
  }
  const auto normed = [&](int c) {
    float2 x = load(c);
    if (head.norm != nullptr) {
      x.x *= scale * head.norm[c];
      x.y *= scale * head.norm[c + 1];
    }
    return x;
  };
#pragma unroll
  for (int i = 0; i < kPairSteps; ++i) {
    const int pair = 2 * lane + 64 * i;
    if (pair >= head.pairs) break;
    const Pairs at = PairsOf(head, pair);
    float2 a = normed(at.a), b = normed(at.b);
    if (head.interleaved) {  // (a.x, a.y) and (b.x, b.y) turn
      const float2 t0 = head.turns[pair], t1 = head.turns[pair + 1];
      store(at.a, {a.x * t0.x - a.y * t0.y, a.y * t0.x + a.x * t0.y});
      store(at.b, {b.x * t1.x - b.y * t1.y, b.y * t1.x + b.x * t1.y});
    } else {  // (a.x, b.x) and (a.y, b.y) turn
      const float2 t0 = head.turns[pair], t1 = head.turns[pair + 1];
      store(at.a, {a.x * t0.x - b.x * t0.y, a.y * t1.x - b.y * t1.y});
      store(at.b, {b.x * t0.x + a.x * t0.y, b.y * t1.x + a.y * t1.y});
    }
  }
  for (int c = 2 * head.pairs + 2 * lane; c < head.head_dim; c += 64) store(c, normed(c));
}

// A block a token, a warp a head at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    SplitQkvKernel(const __grid_constant__ SplitQkvCall call) {
  AwaitBefore();
  const int64_t t = blockIdx.x;
  const int d = call.head_dim, turned = call.q_heads + call.kv_heads;
  const T* y = RowOf<T>(call.y, t);
  for (int h = threadIdx.x / 32; h < turned; h += kThreads / 32) {
    const bool is_q = h < call.q_heads;
    const TurnedHead head = {.norm = is_q ? call.q_norm : call.k_norm,
                             .eps = is_q ? call.q_eps : call.k_eps,
                             .head_dim = d,
                             .pairs = call.pairs,
                             .interleaved = call.pairing == RotaryPairing::kInterleaved,
                             .turns = call.turns + t * call.pairs};
    T* to = is_q ? RowOf<T>(call.q, t) + h * d : RowOf<T>(call.k, t) + (h - call.q_heads) * d;
    TurnHead(head, y + h * d, to);
  }
  const auto* from = reinterpret_cast<const Unit<T>*>(y + turned * d);
  auto* to = reinterpret_cast<Unit<T>*>(RowOf<T>(call.v, t));
  for (int i = threadIdx.x; i < call.kv_heads * d / kUnit; i += kThreads) to[i] = from[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) GateKernel(const __grid_constant__ GateCall call) {
  AwaitBefore();
  const int64_t units = call.width / kUnit;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= call.tokens * units) return;
  const int64_t t = at / units, unit = at % units;
  const auto* y = reinterpret_cast<const Unit<T>*>(RowOf<T>(call.y, t));
  float gate[kUnit], up[kUnit];
  Widen<T>(y[unit], gate);
  Widen<T>(y[units + unit], up);
#pragma unroll
  for (int c = 0; c < kUnit; ++c) up[c] *= gate[c] / (1 + __expf(-gate[c]));
  reinterpret_cast<Unit<T>*>(RowOf<T>(call.out, t))[unit] = Narrow<T>(up);
}

// A block a token of a head's K or V would be short: each takes some tokens of all. From rows of T
// to a cache of Cache.
template <typename T, typename Cache>
__global__ void __launch_bounds__(kThreads) PackKvKernel(const __grid_constant__ PackKvCall call) {
  AwaitBefore();
  const int units = call.head_dim / kUnit;
  const int64_t per_token = 2ll * call.kv_heads * units;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= call.tokens * per_token) return;
  const int64_t t = at / per_token;
  const int in_token = static_cast<int>(at % per_token), unit = in_token % units;
  const int head = in_token / units % call.kv_heads;
  const bool value = in_token / units >= call.kv_heads;
  const auto* from =
      reinterpret_cast<const Unit<T>*>(RowOf<T>(value ? call.v : call.k, t) + head * call.head_dim);
  auto* to = reinterpret_cast<Unit<Cache>*>(
      static_cast<Cache*>(call.out) + t / call.page_tokens * call.page_stride +
      head * call.head_stride + (value ? call.value_stride : 0) +
      t % call.page_tokens * call.head_dim);
  if constexpr (std::is_same_v<T, Cache>) {
    to[unit] = from[unit];
  } else {
    float x[kUnit];
    Widen<T>(from[unit], x);
    to[unit] = Narrow<Cache>(x);
  }
}

unsigned Blocks(int64_t threads) { return static_cast<unsigned>(CeilDiv(threads, kThreads)); }

}  // namespace

cudaError_t EmbedRows(const EmbedCall& call, cudaStream_t stream) {
  return ByType(call.out.dtype, [&](auto type) {
    EmbedKernel<decltype(type)><<<static_cast<unsigned>(call.tokens), kThreads, 0, stream>>>(call);
  });
}

cudaError_t NormalizeRows(const NormCall& call, cudaStream_t stream) {
  const int64_t wanted = CeilDiv(CeilDiv(call.width, kUnit * kHeld), 32) * 32;
  const int threads = static_cast<int>(std::clamp<int64_t>(wanted, 32, kNormThreadsMax));
  return ByType(call.x.dtype, [&](auto type) {
    LaunchOverlapped(NormKernel<decltype(type)>, static_cast<unsigned>(call.tokens), threads,
                     stream, call);
  });
}

cudaError_t FillTurns(const TurnsCall& call, cudaStream_t stream) {
  TurnsKernel<<<Blocks(call.tokens * call.pairs), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t SplitQkv(const SplitQkvCall& call, cudaStream_t stream) {
  return ByType(call.y.dtype, [&](auto type) {
    LaunchOverlapped(SplitQkvKernel<decltype(type)>, static_cast<unsigned>(call.tokens), kThreads,
                     stream, call);
  });
}

cudaError_t GateRows(const GateCall& call, cudaStream_t stream) {
  return ByType(call.y.dtype, [&](auto type) {
    LaunchOverlapped(GateKernel<decltype(type)>, Blocks(call.tokens * call.width / kUnit), kThreads,
                     stream, call);
  });
}

cudaError_t PackKv(const PackKvCall& call, cudaStream_t stream) {
  const int64_t units = call.tokens * 2 * call.kv_heads * call.head_dim / kUnit;
  cudaError_t error = cudaSuccess;  // the inner one's, which takes it
  ByType(call.k.dtype, [&](auto type) {
    error = ByType(call.dtype, [&](auto cache) {
      LaunchOverlapped(PackKvKernel<decltype(type), decltype(cache)>, Blocks(units), kThreads,
                       stream, call);
    });
  });
  return error;
}

}  // namespace prefilld::cuda
