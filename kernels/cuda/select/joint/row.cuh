// One row of the block index in the making, by a warp: what the lines keep, what the pooled map
// adds, what budgets add and cut. A row is a bitmap in shared memory; the map's row is an array of
// integers, so that every sum is exact and blocks are found by bisection, without a sort.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "kernels/cuda/select/block_index.cuh"
#include "kernels/cuda/select/joint/joint.cuh"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {

// The mass of a row of the map, 2^30; bit 31 marks selected blocks, which makes them negative.
constexpr float kMapRow = 1 << 30;
constexpr uint32_t kSelectedBlock = 1u << 31;

// What every row has to hold: the share of its mass, and how many blocks.
struct RowRules {
  double gamma;
  int64_t least, most;
};
inline RowRules RulesOf(const Selection& selection) {
  const int64_t block_size = selection.problem.block_size;
  return {selection.gamma, CeilDiv(std::max<int64_t>(selection.min_budget_tokens, 0), block_size),
          CeilDiv(selection.max_budget_tokens, block_size)};
}

// The head that rows belong to.
struct RowsOfHead {
  Sequence s;
  HeadLines lines;
  int h;
  uint32_t flags;
};

#ifdef __CUDACC__
// The blocks that the lines of a head of n blocks give row I, to words [0, I / 32]; or all of them.
__device__ inline void LineRow(const HeadLines& lines, bool all, int n, int I, uint32_t* words) {
  for (int w = threadIdx.x % 32; w <= I / 32; w += 32) {
    const int bit = n - 1 - I + 32 * w;
    uint32_t word = ~0u;
    if (!all) {
      word = lines.vertical[w] |
             __funnelshift_r(lines.diagonal[bit / 32], lines.diagonal[bit / 32 + 1], bit % 32);
    }
    if (w == I / 32) word &= ~0u >> (31 - I % 32);
    words[w] = word;
  }
  __syncwarp();
}

struct Tally {
  uint32_t mass;
  int count;
};
// Sum and number of the values that are at least `least`, as signed numbers, of 4 * `quads`.
__device__ __forceinline__ Tally AtLeast(const int4* values, int quads, int least) {
  uint32_t mass = 0;
  int count = 0;
#pragma unroll 4
  for (int x = threadIdx.x % 32; x < quads; x += 32) {
    const int4 v = values[x];
    if (v.x >= least) mass += v.x, ++count;
    if (v.y >= least) mass += v.y, ++count;
    if (v.z >= least) mass += v.z, ++count;
    if (v.w >= least) mass += v.w, ++count;
  }
  return {__reduce_add_sync(~0u, mass), __reduce_add_sync(~0u, count)};
}

// Sets the bits of row I whose value is at least `high`, and of those in [low, high) the first
// `ties`.
__device__ inline void SetFrom(const int* values, int I, int low, int high, int ties,
                               uint32_t* words) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int w = 0; w <= I / 32; ++w) {
    const int J = 32 * w + lane;
    const int v = J <= I ? values[J] : INT_MIN;
    uint32_t set = __ballot_sync(~0u, v >= high);
    const uint32_t tied = __ballot_sync(~0u, v >= low && v < high);
    if (ties > 0) {
      const bool first = (tied >> lane & 1) != 0 && __popc(tied & ((1u << lane) - 1)) < ties;
      set |= __ballot_sync(~0u, first);
      ties -= __popc(tied);
    }
    if (lane == 0) words[w] |= set;
  }
  __syncwarp();
}

// Adds to row I the unselected blocks with the largest pooled mass until it holds `goal`. values
// [0, padded) are the masses, 0 beyond I. Selected blocks are marked in them.
__device__ inline void AddMissing(int* values, int I, int padded, uint32_t goal, uint32_t* words) {
  const int lane = threadIdx.x % 32;
  uint32_t held = 0, missing = 0;
  int largest = 0;
#pragma unroll 4
  for (int w = 0; w <= I / 32; ++w) {
    const int J = 32 * w + lane;
    if (J > I) continue;
    const int v = values[J];
    if (words[w] >> lane & 1) {
      held += v;
      values[J] = static_cast<int>(v | kSelectedBlock);
    } else {
      missing += v;
      largest = max(largest, v);
    }
  }
  __syncwarp();
  held = __reduce_add_sync(~0u, held);
  if (held >= goal) return;
  missing = __reduce_add_sync(~0u, missing);
  if (held + missing < goal) {
    SetFrom(values, I, INT_MAX, 0, 0, words);
    return;
  }
  // The last block needed has a value in [low, high): bisect until there is one, or only ties.
  const uint32_t need = goal - held;
  const int quads = padded / 4;
  int low = 1, high = __reduce_max_sync(~0u, largest) + 1;
  int low_count = AtLeast(reinterpret_cast<int4*>(values), quads, low).count;
  Tally above = {0, 0};
  while (high - low > 1 && low_count - above.count > 1) {
    // Masses range over powers of ten: halve their logarithm while that is shorter.
    const int middle = high / 4 > low ? max(low + 1, static_cast<int>(sqrtf(float(low) * high)))
                                      : low + (high - low) / 2;
    const Tally part = AtLeast(reinterpret_cast<int4*>(values), quads, middle);
    if (part.mass >= need) {
      low = middle;
      low_count = part.count;
    } else {
      high = middle;
      above = part;
    }
  }
  const int ties = high - low > 1 ? 1 : static_cast<int>((need - above.mass + low - 1) / low);
  SetFrom(values, I, low, high, ties, words);
}

__device__ inline int Count(const uint32_t* words, int I) {
  int count = 0;
  for (int w = threadIdx.x % 32; w <= I / 32; w += 32) count += __popc(words[w]);
  return __reduce_add_sync(~0u, count);
}

// Adds the nearest earlier blocks until row I has `missing` more.
__device__ inline void Extend(int I, int64_t missing, uint32_t* words) {
  for (int w = I / 32; w >= 0 && missing > 0; --w) {
    uint32_t open = ~words[w];
    if (w == I / 32) open &= ~0u >> (31 - I % 32);
    for (int64_t drop = __popc(open) - missing; drop > 0; --drop) open &= open - 1;
    missing -= __popc(open);
    __syncwarp();
    if (threadIdx.x % 32 == 0) words[w] |= open;
    __syncwarp();
  }
}

// Leaves row I its blocks 0, I and I - 1, and of the others the `others` of the largest pooled
// mass.
__device__ inline void Cut(int* values, int I, int padded, int64_t others, uint32_t* words) {
  const int lane = threadIdx.x % 32;
  // Values of the kept ones, from 1 up; all else 0.
  for (int w = 0; w < padded / 32; ++w) {
    const int J = 32 * w + lane;
    const bool kept = J > 0 && J < I - 1 && (words[J / 32] >> lane & 1) != 0;
    values[J] = kept ? static_cast<int>(values[J] & ~kSelectedBlock) + 1 : 0;
  }
  __syncwarp();
  for (int w = lane; w <= I / 32; w += 32) words[w] = 0;
  __syncwarp();
  if (lane == 0) {
    words[0] |= 1;
    words[I / 32] |= 1u << I % 32;
    if (I > 0) words[(I - 1) / 32] |= 1u << (I - 1) % 32;
  }
  __syncwarp();
  if (others <= 0) return;
  int low = 1, high = INT_MAX;  // at least `others` from low on, fewer from high on
  int above = 0;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    const int count = AtLeast(reinterpret_cast<int4*>(values), padded / 4, middle).count;
    if (count >= others) {
      low = middle;
    } else {
      high = middle;
      above = count;
    }
  }
  SetFrom(values, I, low, high, static_cast<int>(others) - above, words);
}

// Writes row I of the index, by a warp: its lines, and where `values` holds the map, the repair.
__device__ inline void FinishRow(const Problem& p, const RowRules& rules, const RowsOfHead& head,
                                 int I, int* values, int padded, uint32_t* words) {
  const int n = head.s.k_blocks;
  LineRow(head.lines, (head.flags & kKeepsAll) != 0 || I >= n - 2, n, I, words);
  if (values != nullptr && (head.flags & kNeedsRepair) != 0) {
    AddMissing(values, I, padded, static_cast<uint32_t>(ceil(rules.gamma * kMapRow)), words);
  }
  if (rules.least > 0 || rules.most <= I) {
    const int count = Count(words, I);
    Extend(I, min(rules.least, I + int64_t{1}) - count, words);
    if (values != nullptr &&
        max(static_cast<int64_t>(count), min(rules.least, I + int64_t{1})) > rules.most) {
      Cut(values, I, padded, rules.most - min(3, I + 1), words);
    }
  }
  const int64_t row = head.h * p.rows + head.s.row_begin + I - head.s.first_q_block;
  const int count = WriteRow(words, I, p.index + row * p.index_stride);
  if (threadIdx.x % 32 == 0) p.count[row] = count;
}
#endif

}  // namespace prefilld::cuda
