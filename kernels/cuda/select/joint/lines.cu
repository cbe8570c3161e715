// joint, the choice of lines: verticals and diagonals of blocks by mass gained per block computed.
#include <algorithm>

#include "kernels/cuda/select/joint/joint.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kRoundsMax = 40;
constexpr double kLinesBelowGamma = 0.1;  // what the repair is left to find
constexpr int kRowsPerShortRow = 20;      // one probe row in 20 may fall short without a repair
constexpr double kOne = 4294967296.0;     // the mass of a row: 2^32

using Sum = unsigned long long;  // of masses: at most 64 rows of 2^32

// What one thread block works with. All masses are integers, so that sums are exact in any order:
// ties stay ties, and sums can be kept up to date by subtraction, with atomics.
struct Head {
  int n, rows;
  int free_rows;             // rows before the last two blocks of queries, which keep everything
  Sum *vertical, *diagonal;  // [n] uncovered mass on a line; 0 where it is taken
  uint16_t* list;            // [n] lines just taken
  uint8_t* cost;             // [n] probe rows that pay for vertical x, and for diagonal x
  const double* per_cost;    // [65] 1 / cost: dividing costs more than all else of a round
  uint32_t *vertical_bits, *diagonal_bits;  // lines taken; diagonals by offset
  const uint32_t* mass;                     // [rows, slots]
  int64_t slots;
};

// Of the two bitmaps that lie before the sums in shared memory.
__host__ __device__ constexpr int BitmapBytes(int line_words) {
  return (2 * line_words * static_cast<int>(sizeof(uint32_t)) + 15) / 16 * 16;
}
__device__ __forceinline__ bool Bit(const uint32_t* bits, int x) {
  return bits[x / 32] >> x % 32 & 1;
}

__device__ __forceinline__ Sum WarpSum(Sum x) {  // below 2^43 in all
  const Sum low = __reduce_add_sync(~0u, static_cast<unsigned>(x & 0x3fffff));
  return low + (static_cast<Sum>(__reduce_add_sync(~0u, static_cast<unsigned>(x >> 22))) << 22);
}
__device__ __forceinline__ Sum WarpMax(Sum x) {
  const unsigned high = __reduce_max_sync(~0u, static_cast<unsigned>(x >> 32));
  const unsigned low =
      __reduce_max_sync(~0u, high == static_cast<unsigned>(x >> 32) ? static_cast<unsigned>(x) : 0);
  return static_cast<Sum>(high) << 32 | low;
}

// Reductions over the thread block, one barrier each: two buffers used in turn.
class Reducer {
 public:
  struct Result {
    Sum sum;
    unsigned count;
  };
  struct Shared {
    Sum value[2][kWarps];
    unsigned count[2][kWarps];
  };
  __device__ explicit Reducer(Shared* shared) : shared_(shared) {}

  __device__ Result Add(Sum value, unsigned count) {
    const int lane = threadIdx.x % 32;
    value = WarpSum(value);
    count = __reduce_add_sync(~0u, count);
    if (lane == 0) {
      shared_->value[turn_][threadIdx.x / 32] = value;
      shared_->count[turn_][threadIdx.x / 32] = count;
    }
    __syncthreads();
    const Result all = {WarpSum(shared_->value[turn_][lane]),
                        __reduce_add_sync(~0u, shared_->count[turn_][lane])};
    turn_ ^= 1;
    return all;
  }
  __device__ Sum Max(Sum value) {
    const int lane = threadIdx.x % 32;
    value = WarpMax(value);
    if (lane == 0) shared_->value[turn_][threadIdx.x / 32] = value;
    __syncthreads();
    value = WarpMax(shared_->value[turn_][lane]);
    turn_ ^= 1;
    return value;
  }

 private:
  Shared* shared_;
  int turn_ = 0;
};
static_assert(kWarps == 32);

// The gain of a line as the bits of a double >= 0: ordered as the doubles are.
__device__ __forceinline__ Sum GainBits(const Head& head, int x, Sum mass) {
  return static_cast<Sum>(
      __double_as_longlong(static_cast<double>(mass) * head.per_cost[head.cost[x]]));
}

// mass[r][J] of block J in row r, from the parts of the probe. A warp a row, with kAtOnce loads of
// a lane in flight: 12 are what registers allow. A row that holds NaN or infinity has no mass.
template <int kAtOnce>
__device__ void Normalise(const BlockPart* parts, uint32_t* mass, int64_t slots, int rows,
                          const int* block) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
    const BlockPart* row = parts + r * slots;
    const int I = block[r];
    BlockPart part[kAtOnce];
    const auto load = [&](int begin) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int J = begin + 32 * i + lane;
        part[i] = J <= I ? row[J] : BlockPart{-INFINITY, 0};
      }
    };
    float largest = -INFINITY, total = 0;  // of this lane, the total relative to its largest
    for (int begin = 0; begin <= I; begin += 32 * kAtOnce) {
      load(begin);
      float next = largest;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) next = fmaxf(next, part[i].x);
      const float base = next == -INFINITY ? 0.0f : next;
      total *= exp2f(largest - base);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) total += part[i].y * exp2f(part[i].x - base);
      largest = next;
    }
    float all = largest;
    for (int step = 16; step > 0; step /= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, step));
    const float base = all == -INFINITY ? 0.0f : all;
    total *= exp2f(largest - base);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    const bool has_mass = isfinite(total) && total > 0;
    const float weight = has_mass ? static_cast<float>(kOne) / total : 0.0f;
    for (int begin = 0; begin <= I; begin += 32 * kAtOnce) {
      load(begin);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int J = begin + 32 * i + lane;
        const float x = part[i].y * exp2f(part[i].x - base) * weight;
        if (J <= I) mass[r * slots + J] = has_mass ? __float2uint_rn(x) : 0;  // 1 is 1 - 2^-32
      }
    }
  }
}

// The uncovered mass of every line once the forced ones are taken: vertical 0, diagonals 0 and 1.
// Threads beyond n share the rows of a line. All sums are zero before.
__device__ void SumLines(const Head& head, const int* block) {
  const int share = max(1, min(head.rows, kThreads / head.n));  // threads of a line
  const int rows = (head.free_rows + share - 1) / share;
  for (int item = threadIdx.x; item < head.n * share; item += kThreads) {
    const int x = item % head.n, begin = item / head.n * rows;
    const int end = min(head.free_rows, begin + rows);
    Sum vertical = 0, diagonal = 0;
#pragma unroll 8
    for (int r = begin; r < end; ++r) {
      const int I = block[r];
      const uint32_t* row = head.mass + r * head.slots;
      if (x > 0 && I - x >= 2) vertical += row[x];
      if (x >= 2 && I - x >= 1) diagonal += row[I - x];
    }
    if (vertical != 0) atomicAdd(&head.vertical[x], vertical);
    if (diagonal != 0) atomicAdd(&head.diagonal[x], diagonal);
  }
}

// Takes from `sums` the lines with gain >= bar, highest first, ties the lower index first, until
// the uncovered mass is at most `limit`: then true. Otherwise all of them are taken and listed.
__device__ bool TakeLines(const Head& head, Sum* sums, uint32_t* bits, Sum bar, Sum largest,
                          Sum limit, Sum* uncovered, int* listed, Reducer* reducer) {
  const auto from = [&](Sum least) {  // mass and number of the lines with gain >= least
    Sum mass = 0;
    unsigned count = 0;
    for (int x = threadIdx.x; x < head.n; x += kThreads) {
      if (sums[x] == 0 || GainBits(head, x, sums[x]) < least) continue;
      mass += sums[x];
      ++count;
    }
    return reducer->Add(mass, count);
  };
  const Reducer::Result all = from(bar);
  if (*uncovered - all.sum > limit) {
    for (int x = threadIdx.x; x < head.n; x += kThreads) {
      if (sums[x] == 0 || GainBits(head, x, sums[x]) < bar) continue;
      sums[x] = 0;
      atomicOr(&bits[x / 32], 1u << x % 32);
      head.list[atomicAdd(listed, 1)] = static_cast<uint16_t>(x);
    }
    *uncovered -= all.sum;
    return false;
  }
  // A line of gain in [low, high) is the last one needed: bisect until there is one, or only ties.
  Sum low = bar, high = largest + 1;
  unsigned low_count = all.count, high_count = 0;
  Sum high_mass = 0;
  while (high - low > 1 && low_count - high_count > 1) {
    const Sum middle = low + (high - low) / 2;
    const Reducer::Result part = from(middle);
    if (*uncovered - part.sum <= limit) {
      low = middle;
      low_count = part.count;
    } else {
      high = middle;
      high_count = part.count;
      high_mass = part.sum;
    }
  }
  if (low_count - high_count == 1) {
    for (int x = threadIdx.x; x < head.n; x += kThreads) {
      if (sums[x] != 0 && GainBits(head, x, sums[x]) >= low) atomicOr(&bits[x / 32], 1u << x % 32);
    }
  } else if (threadIdx.x < 32) {
    Sum left = *uncovered - high_mass;
    for (int begin = 0; begin < head.n; begin += 32) {
      const int x = begin + threadIdx.x;
      const Sum mass = x < head.n ? sums[x] : 0;
      const Sum gain = mass == 0 ? 0 : GainBits(head, x, mass);
      const bool candidate = mass != 0 && gain >= low && gain < high;
      Sum before = candidate ? mass : 0;  // the mass of candidates before this one
      for (int step = 1; step < 32; step *= 2) {
        const Sum below = __shfl_up_sync(~0u, before, step);
        if (static_cast<int>(threadIdx.x) >= step) before += below;
      }
      const Sum chunk = __shfl_sync(~0u, before, 31);
      before -= candidate ? mass : 0;
      const bool reached = before >= left || left - before <= limit;
      const bool take = mass != 0 && (gain >= high || (candidate && !reached));
      const unsigned taken = __ballot_sync(~0u, take);
      if (threadIdx.x == 0) bits[begin / 32] |= taken;
      left -= min(left, chunk);
    }
  }
  return true;
}

// After lines of one kind were taken, takes what they cover from the sums of the other kind.
__device__ void TakeFromOthers(const Head& head, const int* block, int listed, bool verticals,
                               Sum* others, const uint32_t* other_bits) {
  const int free_rows = head.free_rows;
  for (int r = threadIdx.x / 32; r < free_rows; r += kWarps) {
    const int I = block[r];
    const uint32_t* row = head.mass + r * head.slots;
    for (int x = threadIdx.x % 32; x < listed; x += 32) {
      const int line = head.list[x];
      const int other = I - line;  // the diagonal of vertical `line`, or the other way round
      if (other < 0 || Bit(other_bits, other)) continue;
      atomicAdd(&others[other], ~static_cast<Sum>(row[verticals ? line : other]) + 1);
    }
  }
}

// True if 40 rounds sufficed.
__device__ bool Choose(const Head& head, const int* block, double gamma, int* listed,
                       Reducer* reducer) {
  if (gamma <= 0) return true;
  Sum uncovered = 0;
  for (int x = threadIdx.x; x < head.n; x += kThreads) uncovered += head.vertical[x];
  uncovered = reducer->Add(uncovered, 0).sum;
  const Sum limit = static_cast<Sum>(fmax(0.0, floor((1 - gamma) * head.rows * kOne)));
  // Every round halves the bar, so that lines of both kinds of like worth come before lesser ones,
  // and a line that the others have made worthless does not come at all.
  double bar = INFINITY;
  for (int round = 0; round < kRoundsMax; ++round) {
    if (uncovered <= limit) return true;
    Sum largest = 0;
    for (int x = threadIdx.x; x < head.n; x += kThreads) {
      const Sum vertical = head.vertical[x], diagonal = head.diagonal[x];
      if (vertical + diagonal == 0) continue;
      largest = max(largest, GainBits(head, x, max(vertical, diagonal)));
    }
    largest = reducer->Max(largest);
    if (largest == 0) return true;
    bar = fmin(__longlong_as_double(static_cast<long long>(largest)) / 2, bar / 2);
    const Sum bar_bits = static_cast<Sum>(__double_as_longlong(bar));
    for (const bool verticals : {true, false}) {
      if (uncovered <= limit) return true;
      if (threadIdx.x == 0) *listed = 0;
      __syncthreads();
      if (TakeLines(head, verticals ? head.vertical : head.diagonal,
                    verticals ? head.vertical_bits : head.diagonal_bits, bar_bits, largest, limit,
                    &uncovered, listed, reducer)) {
        return true;
      }
      __syncthreads();
      TakeFromOthers(head, block, *listed, verticals, verticals ? head.diagonal : head.vertical,
                     verticals ? head.diagonal_bits : head.vertical_bits);
      __syncthreads();
    }
  }
  return uncovered <= limit;
}

// A thread block a head of a sequence. First the parts of the probe become masses, then the mass on
// every line is summed, once; from then on sums change only by what a line just taken covers, 64
// entries a line. A round costs a dozen barriers and no pass over the masses.
//
// Bytes: 16 a visible (row, block) read, 4 written and 12 read again, 33 MB at 128K tokens and 32
// heads, all of it in L2: 8 us if all SMs shared it. But a head has one SM, 1 MB passes through
// each, and the rest is latency, 2 to 5 us a round, of which there are one to five: 60 us. Sharing
// a head needs clusters or one more launch, which costs at 4K tokens what it saves at 128K.
__global__ void __launch_bounds__(kThreads)
    LinesKernel(const __grid_constant__ Problem p, const __grid_constant__ JointWork work,
                double gamma, HeadReport* report) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Reducer::Shared reducer_shared;
  __shared__ int block[kProbeRows], listed, short_rows;
  __shared__ double per_cost[kProbeRows + 1];
  const int h = blockIdx.x, lane = threadIdx.x % 32;
  const Sequence s = p.sequence[blockIdx.y];
  const HeadLines lines = work.Lines(p, blockIdx.y, h);
  if (threadIdx.x == 0) {
    HeadReport& head_report = report[static_cast<int64_t>(blockIdx.y) * p.q_heads + h];
    head_report = HeadReport();
    if (s.sq > 0) head_report.pattern = Pattern::kJoint;
    *lines.flags = kKeepsAll;
    if (blockIdx.x == 0 && blockIdx.y == 0) *work.taken = 0;
  }
  if (s.sq == 0) return;

  const int64_t first_block = FirstBlock(s, blockIdx.y, p.block_size);
  const int64_t first_part = static_cast<int64_t>(h) * kProbeRows * work.slots + first_block;
  const int words = (s.k_blocks + 31) / 32;
  unsigned char* gains = work.gains == nullptr
                             ? shared + BitmapBytes(work.line_words)
                             : work.gains + (h * work.slots + first_block) * kGainBytes;
  Head head = {};
  head.n = s.k_blocks;
  head.rows = ProbeRowCount(s);
  head.vertical_bits = reinterpret_cast<uint32_t*>(shared);
  head.diagonal_bits = head.vertical_bits + words;
  head.vertical = reinterpret_cast<Sum*>(gains);
  head.diagonal = head.vertical + head.n;
  head.list = reinterpret_cast<uint16_t*>(head.diagonal + head.n);
  head.cost = reinterpret_cast<uint8_t*>(head.list + head.n);
  head.per_cost = per_cost;
  head.mass = work.mass + first_part;
  head.slots = work.slots;

  if (threadIdx.x < head.rows) {
    block[threadIdx.x] = (s.prefix + ProbeRow(RowRule::kProbe, threadIdx.x, s.sq)) / p.block_size;
  }
  if (threadIdx.x <= kProbeRows)
    per_cost[threadIdx.x] = 1.0 / max(1, static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) short_rows = 0;
  for (int w = threadIdx.x; w < words; w += kThreads) {
    head.vertical_bits[w] = w == 0 ? 1 : 0;
    head.diagonal_bits[w] = w == 0 ? (head.n > 1 ? 3 : 1) : 0;
  }
  __syncthreads();
  const auto rows_from = [&](int x) {  // rows whose block is x or later: they are the last ones
    int low = 0, high = head.rows;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (block[middle] >= x) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return head.rows - low;
  };
  head.free_rows = head.rows - rows_from(head.n - 2);
  for (int x = threadIdx.x; x < head.n; x += kThreads) {
    head.vertical[x] = head.diagonal[x] = 0;
    head.cost[x] = static_cast<uint8_t>(max(1, rows_from(x)));
  }
  const BlockPart* parts = work.parts + first_part;
  uint32_t* mass = work.mass + first_part;
  if (head.n <= 128) {
    Normalise<4>(parts, mass, work.slots, head.rows, block);
  } else {
    Normalise<12>(parts, mass, work.slots, head.rows, block);
  }
  __syncthreads();
  SumLines(head, block);
  __syncthreads();

  Reducer reducer(&reducer_shared);
  const bool reached = Choose(head, block, gamma - kLinesBelowGamma, &listed, &reducer);
  __syncthreads();

  for (int r = threadIdx.x / 32; r < head.rows; r += kWarps) {
    const int I = block[r];
    const uint32_t* row = head.mass + r * head.slots;
    Sum captured = 0;
#pragma unroll 4
    for (int J = lane; J <= I; J += 32) {
      const bool keep = !reached || I >= head.n - 2 || Bit(head.vertical_bits, J) ||
                        Bit(head.diagonal_bits, I - J);
      captured += keep ? row[J] : 0;
    }
    captured = WarpSum(captured);
    if (lane == 0 && static_cast<double>(captured) < gamma * kOne) atomicAdd(&short_rows, 1);
  }
  for (int w = threadIdx.x / 32; w <= words; w += kWarps) {
    const int offset = head.n - 1 - 32 * w - lane;
    const unsigned diagonal =
        __ballot_sync(~0u, offset >= 0 && Bit(head.diagonal_bits, max(offset, 0)));
    if (lane != 0) continue;
    lines.diagonal[w] = diagonal;
    lines.vertical[w] = w < words ? head.vertical_bits[w] : 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *lines.flags =
        (reached ? 0 : kKeepsAll) | (short_rows > head.rows / kRowsPerShortRow ? kNeedsRepair : 0);
  }
}

}  // namespace

cudaError_t ChooseLines(const Selection& selection, const JointWork& work, cudaStream_t stream) {
  const Problem& p = selection.problem;
  size_t bytes = BitmapBytes(work.line_words);
  if (work.gains == nullptr) bytes += static_cast<size_t>(p.k_blocks_max) * kGainBytes;
  const cudaError_t error = cudaFuncSetAttribute(
      LinesKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  LinesKernel<<<dim3(p.q_heads, p.sequences), kThreads, bytes, stream>>>(p, work, selection.gamma,
                                                                         selection.report);
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
