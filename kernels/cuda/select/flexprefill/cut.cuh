// How many of the largest of many scores have a sum within a limit, and where that cuts: without a
// sort, by one thread block or a cluster of them.
//
// Scores are floats from 0 up, whose bits ascend as they do. A histogram of their exponents, with
// the exact sum of every bin, says in which bin the sum crosses the limit; one of the next bits of
// the scores in that bin, in which part of it; after four rounds the cut is one float, and how many
// of its equals fit is a division. Sums are integers, so that the order of the atomics has no say.
// Every lane has its own copy of the bins, in its own bank: no two lanes of a warp ever meet,
// however alike the scores are. Up to four thread blocks of a cluster share the scores of a long
// prompt.
#pragma once

#include <cstdint>

namespace prefilld::cuda {

constexpr int kCutThreads = 1024;
constexpr int kCutBins = 256;

struct CutMemory {
  union {
    struct {
      uint32_t count[kCutBins][32];
      uint32_t high[kCutBins][32], low[kCutBins][32];  // sums of the bits below the bin's, in parts
    };
    struct {  // then, of all lanes
      double sum[kCutBins];
      int64_t total[kCutBins];
    };
  };
  // What the last round found.
  double above_sum;
  int64_t above, in_bin;
  int32_t bin;  // -1: all scores together are within the limit
};

// Scores whose bits are above `bits` are kept, and the first `equal` of those that have them.
struct Cut {
  uint32_t bits;
  int64_t equal, ties;  // ties: how many have them
  int64_t kept;
};

constexpr int kMaxParts = 4;  // thread blocks of a cluster

__device__ __forceinline__ void ClusterSync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
// *value of the thread block of this rank.
__device__ __forceinline__ unsigned long long LoadFromPart(const unsigned long long* value,
                                                           int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned long long x;
  asm volatile(
      "{\n.reg .u32 at;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "ld.shared::cluster.u64 %0, [at];\n}\n"
      : "=l"(x)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(value))), "r"(rank)
      : "memory");
  return x;
#else
  return *value;
#endif
}

// By all kCutThreads threads of `parts` thread blocks (a cluster where they are more than one); the
// same in each. score(i) for i in [0, count).
template <typename Score>
__device__ Cut FindCut(Score score, int64_t count, double limit, int part, int parts,
                       CutMemory* m) {
  constexpr int kAtOnce = 8;                   // loads in flight of a thread
  constexpr int64_t kPass = int64_t{1} << 21;  // scores between two emptyings: 16 bits a lane
  constexpr int kLowBits = 12;
  const int lane = threadIdx.x % 32;
  const uint32_t own_bin = threadIdx.x / 4;
  static_assert(kCutThreads == 4 * kCutBins);
  const int64_t count_end = count * (part + 1) / parts;
  // The bins of this thread block for the others, in the place of what only the first round needs.
  // Two of each, so that a round may begin while others still read the one before.
  auto* const part_count = reinterpret_cast<unsigned long long(*)[kCutBins]>(m->high);
  auto* const part_rest = part_count + 2;
  uint32_t prefix = 0;
  double above_sum = 0;
  int64_t above = 0, in_bin = 0;
#pragma unroll 1
  for (int round = 0; round < 4; ++round) {
    const int shift = round == 0 ? 23 : round == 1 ? 15 : round == 2 ? 7 : 0;
    const int bits = round == 3 ? 7 : 8;
    int64_t bin_count = 0, bin_rest = 0;  // of this thread's copies of own_bin
#pragma unroll 1
    for (int64_t pass = count * part / parts; pass < count_end; pass += kPass) {
      for (int x = threadIdx.x; x < kCutBins * 32; x += kCutThreads) {
        m->count[x / 32][lane] = m->low[x / 32][lane] = 0;
        if (round == 0) m->high[x / 32][lane] = 0;
      }
      __syncthreads();
      const int64_t end = pass + kPass < count_end ? pass + kPass : count_end;
#pragma unroll 1
      for (int64_t i = pass + threadIdx.x; i < end; i += kAtOnce * kCutThreads) {
        uint32_t x[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int64_t at = i + k * kCutThreads;
          x[k] = at < end ? __float_as_uint(score(at)) : ~0u;
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (x[k] >> 31 || x[k] >> shift >> bits != prefix) continue;
          const uint32_t bin = x[k] >> shift & ((1u << bits) - 1);
          const uint32_t rest = x[k] & ((1u << shift) - 1);
          atomicAdd(&m->count[bin][lane], 1u);
          if (round == 0) {
            atomicAdd(&m->low[bin][lane], rest & ((1u << kLowBits) - 1));
            atomicAdd(&m->high[bin][lane], rest >> kLowBits);
          } else if (round < 3) {
            atomicAdd(&m->low[bin][lane], rest);
          }
        }
      }
      __syncthreads();
      {  // four threads a bin, eight copies each, no two lanes in a bank
        int64_t high = 0, low = 0, number = 0;
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          const int copy = (lane + 4 * x) % 32;
          number += m->count[own_bin][copy];
          low += m->low[own_bin][copy];
          if (round == 0) high += m->high[own_bin][copy];
        }
        bin_count += number;
        bin_rest += (high << kLowBits) + low;
      }
      __syncthreads();
    }
    for (int step = 1; step < 4; step *= 2) {
      bin_count += __shfl_xor_sync(~0u, bin_count, step);
      bin_rest += __shfl_xor_sync(~0u, bin_rest, step);
    }
    if (parts > 1) {
      if (lane % 4 == 0) {
        part_count[round % 2][own_bin] = bin_count;
        part_rest[round % 2][own_bin] = bin_rest;
      }
      ClusterSync();
      bin_count = bin_rest = 0;
      if (lane % 4 < parts) {
        bin_count = LoadFromPart(&part_count[round % 2][own_bin], lane % 4);
        bin_rest = LoadFromPart(&part_rest[round % 2][own_bin], lane % 4);
      }
      for (int step = 1; step < 4; step *= 2) {
        bin_count += __shfl_xor_sync(~0u, bin_count, step);
        bin_rest += __shfl_xor_sync(~0u, bin_rest, step);
      }
    }
    if (lane % 4 == 0) {
      const uint32_t first = (prefix << bits | own_bin) << shift;
      const uint32_t exponent = first >> 23;
      const double unit = exp2(static_cast<double>(exponent > 0 ? exponent : 1) - 150);
      m->total[own_bin] = bin_count;
      // Beyond 254 is no number; scores are finite, so nothing is there.
      m->sum[own_bin] = static_cast<double>(bin_count) * __uint_as_float(first) +
                        static_cast<double>(bin_rest) * unit;
      if (bin_count == 0) m->sum[own_bin] = 0;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // The bins from the top, 8 a lane: where the running sum first exceeds the limit.
      double own = 0;
      int64_t own_count = 0;
      const int top = kCutBins - 1 - 8 * lane;
      for (int x = 0; x < 8; ++x) {
        own += m->sum[top - x];
        own_count += m->total[top - x];
      }
      double before = own;
      int64_t before_count = own_count;
      for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(~0u, before, step);
        const int64_t other_count = __shfl_up_sync(~0u, before_count, step);
        if (lane >= step) before += other, before_count += other_count;
      }
      before = __shfl_up_sync(~0u, before, 1);
      before_count = __shfl_up_sync(~0u, before_count, 1);
      if (lane == 0) before = 0, before_count = 0;
      before += above_sum;
      before_count += above;
      int bin = -1;
      for (int x = 0; x < 8 && bin < 0; ++x) {
        const double with = before + m->sum[top - x];
        if (m->total[top - x] > 0 && !(with <= limit)) {
          bin = top - x;
        } else {
          before = with;
          before_count += m->total[top - x];
        }
      }
      const unsigned found = __ballot_sync(~0u, bin >= 0);
      const int first = found == 0 ? 31 : __ffs(static_cast<int>(found)) - 1;
      if (lane == first) {
        m->bin = bin;
        m->above_sum = before;
        m->above = before_count;
        m->in_bin = bin < 0 ? 0 : m->total[bin];
      }
    }
    __syncthreads();
    if (m->bin < 0) {
      // All are within the limit. In a later round that is rounding: the bin as a whole was not;
      // its least float is then the cut.
      const Cut all = {round == 0 ? 0 : prefix << bits << shift, count, count, m->above};
      __syncthreads();
      if (parts > 1) ClusterSync();  // others may still read what this thread block found
      return all;
    }
    prefix = prefix << bits | m->bin;
    above_sum = m->above_sum;
    above = m->above;
    in_bin = m->in_bin;
    __syncthreads();
  }
  if (parts > 1) ClusterSync();
  const double value = __uint_as_float(prefix);
  int64_t equal = value > 0 ? static_cast<int64_t>(floor((limit - above_sum) / value)) : in_bin;
  equal = equal < 0 ? 0 : equal > in_bin ? in_bin : equal;
  return {prefix, equal, in_bin, above + equal};
}

}  // namespace prefilld::cuda
