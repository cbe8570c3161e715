#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "tests/bench/attention/attention_workload.h"

namespace prefilld::bench {
namespace {

using cuda::Problem;
using cuda::Sequence;
using cuda::Tensor;

constexpr int kSinkTokens = 4;
constexpr int kVerticals = 48;  // a sequence
constexpr int kTopics = 16;
constexpr int kTopicTokens = 256;
constexpr float kKeyAmplitude = 2;  // of a direction in the channels of a key that carries it
constexpr float kKeyNoise = 0.5f;

// What a hash is of; the first argument of Hash, so that no two draws are the same.
enum Draw : uint32_t { kNoise, kValue, kDirection, kVertical, kTopic, kJitter, kHead };

__device__ uint32_t Hash(Draw draw, uint32_t seed, uint64_t a, uint64_t b = 0) {
  uint64_t x = (a << 24 ^ b) + (static_cast<uint64_t>(seed) << 8 | draw) * 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((x ^ x >> 31) >> 16);
}

__device__ float Uniform(uint32_t hash) { return (hash + 0.5f) * 0x1p-32f; }

__device__ float Normal(uint32_t hash) {  // of the two halves
  const float u = ((hash >> 16) + 0.5f) * 0x1p-16f, v = (hash & 0xFFFF) * 0x1p-16f;
  return sqrtf(-2 * __logf(u)) * cospif(2 * v);
}

__device__ float Sign(uint32_t seed, uint32_t direction, int channel) {
  return Hash(kDirection, seed, direction, channel) & 1 ? 1.0f : -1.0f;
}
__device__ constexpr uint32_t kSink = 0, kVerticalDirection = 1, kFirstTopic = 2;

template <typename T>
__device__ void Store(const Tensor& tensor, int64_t token, int64_t head, int channel, float x) {
  static_cast<T*>(tensor.data)[token * tensor.token_stride + head * tensor.head_stride + channel] =
      T(x);
}
template <typename T>
__device__ float Load(const Tensor& tensor, int64_t token, int64_t head, int channel) {
  return float(static_cast<const T*>(
      tensor.data)[token * tensor.token_stride + head * tensor.head_stride + channel]);
}

__device__ uint32_t Topic(uint32_t seed, int64_t position, int kv_head) {
  return Hash(kTopic, seed, position / kTopicTokens, kv_head) % kTopics;
}

// A channel is one of a pair that turns with the position, or one of a direction.
__device__ bool Turns(int channel, int d) { return channel % (d / 2) < d / 4; }

// cos or sin of the phase of `position` in this channel.
__device__ float Turn(int channel, int d, double position) {
  const int pairs = d / 4, pair = channel % (d / 2);
  const double wavelength = 4 * pow(131072.0, static_cast<double>(pair) / (pairs - 1));
  const double turns = position / wavelength;
  const float phase = static_cast<float>(turns - floor(turns));
  return channel < d / 2 ? cospif(2 * phase) : sinpif(2 * phase);
}

// One thread a (token, channel); a block of threads has d channels of blockDim / d tokens.
template <typename T>
__global__ void FillKeys(Problem p, Structure structure, bool structured) {
  const int d = p.head_dim, channel = threadIdx.x % d;
  const Sequence s = p.sequence[blockIdx.z];
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / d) + threadIdx.x / d;
  const int g = blockIdx.y;
  if (t >= s.sk) return;
  const uint32_t seed = structure.seed * 2 + blockIdx.z * 977;
  const uint64_t at = (t * p.kv_heads + g) * 256 + channel;
  Store<T>(p.v, s.k_begin + t, g, channel, Normal(Hash(kValue, seed, at)));
  float x = Normal(Hash(kNoise, seed, at, 1));
  if (structured) {
    x *= kKeyNoise;
    if (Turns(channel, d)) {
      x += Turn(channel, d, static_cast<double>(t));
    } else {
      if (t < kSinkTokens) x += kKeyAmplitude * Sign(seed, kSink, channel);
      if (Hash(kVertical, seed, t, g) % s.sk < kVerticals) {
        x += kKeyAmplitude * Sign(seed, kVerticalDirection, channel);
      }
      x += kKeyAmplitude / 2 * Sign(seed, kFirstTopic + Topic(seed, t, g), channel);
    }
  }
  Store<T>(p.k, s.k_begin + t, g, channel, x);
}

template <typename T>
__global__ void FillQueries(Problem p, Structure structure, bool structured) {
  const int d = p.head_dim, channel = threadIdx.x % d;
  const Sequence s = p.sequence[blockIdx.z];
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / d) + threadIdx.x / d;
  const int h = blockIdx.y, g = h / (p.q_heads / p.kv_heads), kind = h % 4;
  if (t >= s.sq) return;
  const uint32_t seed = structure.seed * 2 + blockIdx.z * 977;
  float x = Normal(Hash(kNoise, seed, (t * p.q_heads + h) * 256 + channel, 2));
  if (structured) {
    const int64_t position = s.prefix + t;
    // Heads and tokens are not all as sure of themselves.
    const float jitter =
        0.8f + 0.4f * Uniform(Hash(kHead, seed, h)) + 0.2f * Normal(Hash(kJitter, seed, t, h));
    const float strength = static_cast<float>(structure.strength) * jitter;
    // A score L comes from an amplitude of L / (scale * what a key holds).
    const float turning = strength / (p.softmax_scale * (d / 4));
    const float directed = strength / (p.softmax_scale * kKeyAmplitude * (d / 2));
    const float rivals = __logf(static_cast<float>(s.sk));  // as many keys want to be outweighed
    const double back = kind == 1 ? 20 + Hash(kHead, seed, h, 1) % 4000 : 0;
    const float local = kind == 0 ? 18 : kind == 1 ? 18 : kind == 2 ? 8 : 10;
    if (Turns(channel, d)) {
      x += local * turning * Turn(channel, d, static_cast<double>(position) - back);
    } else {
      if (kind != 3) x += rivals * directed * Sign(seed, kSink, channel);
      if (kind == 2) x += (rivals + 2) * directed * Sign(seed, kVerticalDirection, channel);
      if (kind == 3) {
        x += 12 * directed * Sign(seed, kFirstTopic + Topic(seed, position, g), channel);
      }
    }
  }
  Store<T>(p.q, s.q_begin + t, h, channel, x);
}

template <typename T>
cudaError_t Fill(const Problem& p, const Structure& structure, bool structured,
                 cudaStream_t stream) {
  const int tokens = 512 / p.head_dim, threads = tokens * p.head_dim;
  const auto blocks = [&](int64_t length) {
    return static_cast<unsigned>((length + tokens - 1) / tokens);
  };
  const auto sequences = static_cast<unsigned>(p.sequences);
  FillKeys<T><<<dim3(blocks(p.sk_max), static_cast<unsigned>(p.kv_heads), sequences), threads, 0,
                stream>>>(p, structure, structured);
  FillQueries<T>
      <<<dim3(blocks(p.sq_max), static_cast<unsigned>(p.q_heads), sequences), threads, 0, stream>>>(
          p, structure, structured);
  return cudaGetLastError();
}

__device__ const Sequence& SequenceOf(const Problem& p, int32_t token) {
  int s = 0;
  while (s + 1 < p.sequences && p.sequence[s + 1].q_begin <= token) ++s;
  return p.sequence[s];
}

constexpr int kExactWarps = 16;
constexpr int kHeadDimMax = 256;

// One thread block a (query, head), each warp every 16th key with an online softmax of its own. A
// lane holds d / 32 channels. Not fast: it is the yardstick, written to be plainly right.
template <typename T>
__global__ void Exact(Problem p, const int32_t* tokens, bool dense, float* expected) {
  constexpr int kLaneChannels = kHeadDimMax / 32;
  const int d = p.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t token = tokens[blockIdx.x];
  const int h = blockIdx.y, g = h / (p.q_heads / p.kv_heads);
  const Sequence s = SequenceOf(p, token);
  const int64_t position = s.prefix + (token - s.q_begin);
  const int64_t I = position / p.block_size;
  const int64_t row = h * p.rows + s.row_begin + I - s.first_q_block;
  const int64_t blocks = dense ? I + 1 : p.count[row];
  float q[kLaneChannels], o[kLaneChannels] = {}, max = -INFINITY, sum = 0;
  for (int x = 0; x < kLaneChannels; ++x) {
    q[x] = x * 32 + lane < d ? Load<T>(p.q, token, h, x * 32 + lane) * p.softmax_scale : 0;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t J = dense ? b : p.index[row * p.index_stride + b];
    const int64_t end = min((J + 1) * p.block_size, position + 1);
    for (int64_t j = J * p.block_size + warp; j < end; j += kExactWarps) {
      float score = 0;
      for (int x = 0; x * 32 < d; ++x) {
        if (x * 32 + lane < d) score += q[x] * Load<T>(p.k, s.k_begin + j, g, x * 32 + lane);
      }
      for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
      const float next = fmaxf(max, score), keep = expf(max - next), weight = expf(score - next);
      max = next;
      sum = sum * keep + weight;
      for (int x = 0; x * 32 < d; ++x) {
        if (x * 32 + lane < d) {
          o[x] = o[x] * keep + weight * Load<T>(p.v, s.k_begin + j, g, x * 32 + lane);
        }
      }
    }
  }
  __shared__ float maxes[kExactWarps], sums[kExactWarps], outputs[kExactWarps][kHeadDimMax];
  if (lane == 0) maxes[warp] = max, sums[warp] = sum;
  for (int x = 0; x < kLaneChannels; ++x) outputs[warp][x * 32 + lane] = o[x];
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < d; c += static_cast<int>(blockDim.x)) {
    float largest = -INFINITY, all = 0, value = 0;
    for (int w = 0; w < kExactWarps; ++w) largest = fmaxf(largest, maxes[w]);
    for (int w = 0; w < kExactWarps; ++w) {
      const float weight = maxes[w] == -INFINITY ? 0 : expf(maxes[w] - largest);
      all += weight * sums[w];
      value += weight * outputs[w][c];
    }
    expected[(static_cast<int64_t>(blockIdx.x) * p.q_heads + h) * d + c] =
        all > 0 ? value / all : 0;
  }
}

template <typename T>
__global__ void Gather(Problem p, const int32_t* tokens, float* got) {
  for (int c = static_cast<int>(threadIdx.x); c < p.head_dim; c += static_cast<int>(blockDim.x)) {
    got[(static_cast<int64_t>(blockIdx.x) * p.q_heads + blockIdx.y) * p.head_dim + c] =
        Load<T>(p.o, tokens[blockIdx.x], blockIdx.y, c);
  }
}

__global__ void Read(const uint4* data, int64_t count) {
  uint32_t all = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const uint4 x = data[i];
    all |= x.x | x.y | x.z | x.w;
  }
  // Never true: the memory is zero. It keeps the loads.
  if (all == 0xFFFFFFFF) const_cast<uint4*>(data)[0].x = all;
}

template <typename Launch>
cudaError_t ByType(DType dtype, const Launch& launch) {
  if (dtype == DType::kF32) return launch(float{});
  return dtype == DType::kBF16 ? launch(__nv_bfloat16{}) : launch(__half{});
}

}  // namespace

cudaError_t FillStructured(const Problem& problem, const Structure& structure,
                           cudaStream_t stream) {
  return ByType(problem.dtype,
                [&](auto type) { return Fill<decltype(type)>(problem, structure, true, stream); });
}

cudaError_t FillRandom(const Problem& problem, uint32_t seed, cudaStream_t stream) {
  const Structure structure{.strength = 0, .seed = seed};
  return ByType(problem.dtype,
                [&](auto type) { return Fill<decltype(type)>(problem, structure, false, stream); });
}

cudaError_t AttendExactly(const Problem& problem, const int32_t* tokens, int count, bool dense,
                          float* expected, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(problem.q_heads));
  return ByType(problem.dtype, [&](auto type) {
    Exact<decltype(type)><<<grid, 32 * kExactWarps, 0, stream>>>(problem, tokens, dense, expected);
    return cudaGetLastError();
  });
}

cudaError_t GatherOutput(const Problem& problem, const int32_t* tokens, int count, float* got,
                         cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(problem.q_heads));
  return ByType(problem.dtype, [&](auto type) {
    Gather<decltype(type)><<<grid, 64, 0, stream>>>(problem, tokens, got);
    return cudaGetLastError();
  });
}

cudaError_t ReadThrough(const void* data, size_t bytes, cudaStream_t stream) {
  Read<<<1024, 256, 0, stream>>>(static_cast<const uint4*>(data),
                                 static_cast<int64_t>(bytes / sizeof(uint4)));
  return cudaGetLastError();
}

}  // namespace prefilld::bench
