// Stage 3 from Ampere on (sm_80; 8.6, 8.9 and 9.0 run it too): block-sparse causal attention with
// cp.async, ldmatrix and mma.sync.
//
// A task is one (query head, row of blocks). A thread block takes task after task; each of its
// warps has 32 queries (16 where d = 256), whose Q and O stay in registers from the first key to
// the last, and goes through the keys in steps of 16. In a step a warp issues
//
//   S' = Q K'^T of the next 16 keys,  while exp2 makes P of the scores of the present 16,
//   O += P V of the present 16 keys,  while S' is scaled and made relative to the reference.
//
// So the tensor cores have products in hand that wait for no softmax. The reference of a row, what
// its exponents are relative to, is raised only where a score exceeds it by more than kRaise: a
// vote of the warp, rare after the first keys. A step shuffles nothing and leaves O alone, and the
// causal mask lives on that rare path.
//
// Roofline at d = 128, a pair of 128 x 128 blocks: 2,048 products m16n8k16 (8.4 MFLOP). The four
// quarters of an SM take 8 cycles for four of them on 8.0, and 6.5 on 9.0, 3,300 cycles a pair
// (mma.sync reaches 650 TFLOP/s on an H200: 1.7 us for 132 pairs). For each, shared memory, 128
// bytes a cycle, has 128 bytes to give, fragments of K and V, and 32 to take: 5 cycles for four.
// That is why a warp has 32 queries and Q in registers: with Q in shared memory it would be 6
// cycles, with 16 queries a warp 9. The exponentials are 1,024 cycles a pair, and 64 KB from L2 are
// 20 bytes a cycle. So the tensor cores are the bound.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/attend/task_queue.h"
#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/instructions/cp_async.cuh"
#include "kernels/cuda/instructions/mma.cuh"
#include "kernels/cuda/kernel_table.h"

namespace prefilld::cuda {
namespace {

// Scores above the reference by less than this (powers of two) leave it alone. More would mean
// fewer raises; but P stays below 256 and so, like its sums, inside what FP16 and FP32 hold.
constexpr float kRaise = 8;
// The reference of a row whose first 16 scores are all -infinity: a later one that is not far below
// raises it.
constexpr float kUnset = -4096;
constexpr int kStepKeys = 16;  // the depth of one product; more would cost registers that Q has
constexpr int kStepStride = kStepKeys * kRowBytes;

template <int kD, int kB>
struct Plan {
  // Products of 16 queries that share a fragment of K or V in registers: two halve what is read
  // from shared memory; d = 256 has registers for one.
  static constexpr int kTiles = kD <= 128 ? 2 : 1;
  static constexpr int kWarps = kB / (16 * kTiles);
  static constexpr int kThreads = 32 * kWarps;
  // Keys of a stage, which costs a barrier and some 200 cycles: 64 where two blocks of threads
  // still fit the 164 KB of an SM 8.0 (75 KB each at d = 128).
  static constexpr int kKeys = kB == 128 && kD <= 128 ? 64 : 32;
  static constexpr int kSteps = kKeys / kStepKeys;
  static constexpr int kStagesOfBlock = kB / kKeys;
  // Shared memory holds K and V as rings of steps, [channels / 64][ring][16 keys][64 channels]: a
  // stage in use, the next one coming, and one step because V lies a step further on than K (its
  // product lags by a step, so one address leads to both). The 16-byte vectors of a row are
  // permuted (vector ^ key % 8), so that one vector of eight keys, what a phase of ldmatrix reads,
  // lies in eight different banks. The eight of a key have to stay together in 128 bytes: cp.async
  // is several times slower where it has to scatter what L2 gives it.
  static constexpr int kRing = 2 * kSteps + 1;
  static constexpr int kHalfStride = kRing * kStepStride;
  static constexpr int kVBegin = (kD + 63) / 64 * kHalfStride;
  static constexpr int kSharedBytes = 2 * kVBegin;
  // 8 warps an SM with up to 255 registers each, 12 with 168 where d = 64.
  static constexpr int kBlocksOfSm = (kD == 64 ? 12 : 8) / kWarps;
};

struct Params {
  TaskQueue queue;
  int32_t tasks, rows;
  int32_t group;  // query heads to one of K and V
  const Sequence* sequence;
  const uint16_t* index;
  int64_t index_stride;
  const int32_t* pages;  // or null
  int32_t page_shift;    // tokens of a page: 2^page_shift
  int32_t page_mask;     // blocks of a page, less one
  int32_t page_units;    // from a page to the next
  const char *q, *k, *v;
  char* o;
  float* lse;
  int64_t total_q;
  // Bytes. A unit is as large as a block of K: of a contiguous sequence, or of the arena.
  int64_t q_token, q_head, o_token, o_head;
  int32_t k_token, v_token;
  int64_t k_head, k_unit, v_head, v_unit;
  float scale_log2;  // softmax_scale / ln 2
};

// One (head, row of blocks), looked up once for all threads.
struct Task {
  int32_t head;        // -1: there are no more
  int32_t count;       // blocks of keys
  int32_t q_token;     // of row 0 of the tile; rows outside [first, end) are none of ours
  int32_t first, end;  // rows of the tile
  int32_t diagonal;    // the last block is that of the queries
  int32_t first_unit;  // where its first block is
  const uint16_t* index;
  const int32_t* pages;  // of the sequence, or null
  const char *k, *v;     // of unit 0
};

// One instruction, with all 64 bits.
__device__ __forceinline__ int64_t Times(int32_t a, int32_t b) {
  return static_cast<int64_t>(a) * b;
}

template <int kB>
__device__ Task FindTask(const Params& p, int32_t at) {
  Task task = {};
  task.head = -1;
  if (at >= p.tasks) return task;
  const QueuedTask queued = p.queue.task[at];
  task.head = queued.head;
  task.count = queued.count;
  task.index = p.index + (Times(queued.head, p.rows) + queued.row) * p.index_stride;
  const Sequence s = p.sequence[queued.sequence];
  const int32_t block = s.first_q_block + queued.row - s.row_begin;
  const int32_t begin = block * kB;  // absolute position
  task.q_token = s.q_begin + begin - s.prefix;
  task.first = max(0, s.prefix - begin);
  task.end = min(kB, s.sk - begin);
  task.diagonal = task.count > 0 && task.index[task.count - 1] == block;
  const int g = task.head / p.group;
  task.k = p.k + g * p.k_head;
  task.v = p.v + g * p.v_head;
  if (p.pages == nullptr) {
    task.k += Times(s.k_begin, p.k_token);
    task.v += Times(s.k_begin, p.v_token);
  } else {
    task.pages = p.pages + s.page_begin;
  }
  if (task.count > 0) {
    task.first_unit = task.index[0];
    if (task.pages != nullptr) {
      const int32_t page = task.pages[task.first_unit * kB >> p.page_shift];
      task.first_unit = page * p.page_units + (task.first_unit & p.page_mask);
    }
  }
  return task;
}

// The index of this thread, to the compiler another for every `now` (a stage, a shared address:
// small numbers): so what is computed from it does not stay in registers through the steps, which
// have none to spare.
__device__ __forceinline__ uint32_t Thread(uint32_t now) { return threadIdx.x | (now >> 30); }

// ---- A warp's state -----------------------------------------------------------------------------

// Element j of a product lies in query 16 tile + lane / 4 (+ 8 where j & 2) and column
// 8 n + 2 (lane % 4) + j % 2 (PTX, the C fragment of m16n8k16).
template <int kTiles>
using Scores = float[kTiles][2][4];

template <int kD, int kTiles>
struct Rows {
  uint32_t q[kD / 16][kTiles][4];
  float o[kTiles][kD / 8][4];
  float sum[kTiles][2];  // of this thread's columns only
};

// What the exponents of a row are relative to, in powers of two. A step needs them once: they lie
// in shared memory, each thread's own, and not in registers.
template <int kTiles>
struct alignas(8 * kTiles) References {
  float of[kTiles][2];
};

// Fragments of Q straight from device memory: 4 bytes a load, but once a task.
template <int kD, int kTiles>
__device__ __forceinline__ void LoadQueries(const Params& p, const Task& task,
                                            uint32_t (&q)[kD / 16][kTiles][4]) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * kTiles;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * t + 8 * r + lane / 4;
      const bool ours = row >= task.first && row < task.end;
      const char* from = p.q + task.head * p.q_head +
                         static_cast<int64_t>(task.q_token + row) * p.q_token + lane % 4 * 4;
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          q[k][t][r + 2 * half] =
              ours ? *reinterpret_cast<const uint32_t*>(from + 32 * k + 16 * half) : 0;
        }
      }
    }
  }
}

// Copies a stage of K or V, whose first step has this place in the ring at `ring`: eight lanes copy
// 128 bytes of a key.
template <int kD, int kB>
__device__ __forceinline__ void CopyStage(uint32_t thread, uint32_t ring, uint32_t place,
                                          const char* from, int32_t stride, int keys) {
  using P = Plan<kD, kB>;
  constexpr int kKeysAtOnce = P::kThreads / 8;
  static_assert(kKeysAtOnce >= 8 && kKeysAtOnce <= P::kKeys);
  const uint32_t key = thread / 8, vector = thread % 8;
  const uint32_t own = ring + key % 16 * kRowBytes + (vector ^ key % 8) * 16;
  from += Times(static_cast<int32_t>(key), stride) + vector * 16;
#pragma unroll
  for (int i = 0; i < P::kKeys / kKeysAtOnce; ++i) {
    const int at = i * kKeysAtOnce;
    uint32_t step = place + at / 16;
    if (kKeysAtOnce > 16) step += key / 16;
    const uint32_t there =
        own + (step < P::kRing ? step : step - P::kRing) * kStepStride + at % 16 * kRowBytes;
#pragma unroll
    for (int j = 0; j < kD; j += 64) {
      if (j + 64 <= kD || j + static_cast<int>(vector) * 8 < kD) {
        CopyAsyncOfLine(there + j / 64 * P::kHalfStride, from + j * 2,
                        at < keys - static_cast<int>(key));
      }
    }
    from += Times(kKeysAtOnce, stride);
  }
}

// Where the next block is: copied by one thread, stages ahead, like K and V.
struct Next {
  uint32_t index[2];  // the 4 aligned bytes of the index that have entry i, at i % 2
  int32_t page[2];
};

__device__ __forceinline__ int32_t Entry(const uint16_t* index, uint32_t around) {
  return around >> (reinterpret_cast<uintptr_t>(index) % 4 * 8) & 0xffff;
}

// Stages are loaded in order, from 0.
template <int kD, int kB>
__device__ __forceinline__ void Load(const Params& p, const Task& task, Next& next, uint32_t ring,
                                     int stage) {
  using P = Plan<kD, kB>;
  const uint32_t thread = Thread(stage);
  const int part = stage % P::kStagesOfBlock, block = stage / P::kStagesOfBlock;
  const bool more = block + 1 < task.count;
  const uint16_t* after = task.index + block + 1;
  if (thread == 0 && more) {
    if (part == 0) {
      CopyAsync4(&next.index[(block + 1) % 2],
                 reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(after) & ~uintptr_t{3}));
    } else if (part == 1 && task.pages != nullptr) {
      CopyAsync4(&next.page[(block + 1) % 2],
                 task.pages + (Entry(after, next.index[(block + 1) % 2]) * kB >> p.page_shift));
    }
  }
  int32_t unit = block == 0 ? task.first_unit : Entry(after - 1, next.index[block % 2]);
  if (block > 0 && task.pages != nullptr) {
    unit = next.page[block % 2] * p.page_units + (unit & p.page_mask);
  }
  const int first = part * P::kKeys;
  // Only of the last block of a sequence are there fewer, and that one is the diagonal of the task.
  const int keys = (more || !task.diagonal ? kB : task.end) - first;
  const uint32_t place = static_cast<uint32_t>(stage) * P::kSteps % P::kRing;
  CopyStage<kD, kB>(thread, ring, place, task.k + unit * p.k_unit + Times(first, p.k_token),
                    p.k_token, keys);
  CopyStage<kD, kB>(thread, ring + P::kVBegin, place + 1,
                    task.v + unit * p.v_unit + Times(first, p.v_token), p.v_token, keys);
}

// Scores beyond the diagonal become -infinity. `ahead` is how far the key of x[0][0][0] is ahead of
// its query.
template <int kTiles>
__device__ __forceinline__ void Mask(Scores<kTiles>& x, int ahead) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (ahead + 8 * n + j % 2 > 16 * t + j / 2 * 8) x[t][n][j] = -INFINITY;
      }
    }
  }
}

template <int kTiles>
__device__ __forceinline__ float Largest(const Scores<kTiles>& x) {
  float top[2] = {-INFINITY, -INFINITY};  // two chains, half as long
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) top[i % 2] = fmaxf(top[i % 2], x[i / 8][i / 4 % 2][i % 4]);
  return fmaxf(top[0], top[1]);
}

// Raises the references of a warp's rows to the largest of x, and rescales what is relative to
// them.
template <bool kFirst, int kD, int kTiles>
__device__ __forceinline__ void Raise(Rows<kD, kTiles>& rows, Scores<kTiles>& x,
                                      References<kTiles>& references) {
  References<kTiles> raised = {};
  if constexpr (!kFirst) raised = references;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(fmaxf(x[t][0][2 * r], x[t][0][2 * r + 1]),
                        fmaxf(x[t][1][2 * r], x[t][1][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // The other rows of the warp stay as they are: what a row gets is its own affair.
      const float by = kFirst ? (top == -INFINITY ? kUnset : top) : top > kRaise ? top : 0;
      raised.of[t][r] += by;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        x[t][n][2 * r] -= by;
        x[t][n][2 * r + 1] -= by;
      }
      if constexpr (!kFirst) {
        const float scale = Exp2(-by);
        rows.sum[t][r] *= scale;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          rows.o[t][n][2 * r] *= scale;
          rows.o[t][n][2 * r + 1] *= scale;
        }
      }
    }
  }
  references = raised;
}

// P, as the A fragment of the product with V, of pair i of this thread's scores.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void Exponentiate(Rows<kD, kTiles>& rows, const Scores<kTiles>& x,
                                             uint32_t (&p)[kTiles][4], int i) {
  const int t = i / 4, n = i / 2 % 2, r = i % 2;
  const float low = Exp2(x[t][n][2 * r]), high = Exp2(x[t][n][2 * r + 1]);
  rows.sum[t][r] += low + high;
  p[t][r + 2 * n] = Pack<T>(low, high);
}

template <typename T, int kD, int kTiles>
__device__ __forceinline__ void ScoreStep(const Rows<kD, kTiles>& rows, Scores<kTiles>& s, int k,
                                          const uint32_t (&b)[4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) Mma<T>(s[t][n], rows.q[k][t], b[2 * n], b[2 * n + 1]);
  }
}

template <typename T, int kD, int kTiles>
__device__ __forceinline__ void ValueStep(Rows<kD, kTiles>& rows, const uint32_t (&p)[kTiles][4],
                                          int k, const uint32_t (&b)[4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) Mma<T>(rows.o[t][2 * k + n], p[t], b[2 * n], b[2 * n + 1]);
  }
}

// Where channels 16 k ... lie, from where the first do.
template <int kD, int kB>
__device__ __forceinline__ uint32_t PartAt(uint32_t from, int k) {
  return (from ^ (k % 4 * 32)) + k / 4 * Plan<kD, kB>::kHalfStride;
}
// Parts in an order that uses a permuted address for every 64 channels before the next address.
__device__ constexpr int Part(int i, int parts) {
  const int halves = (parts + 3) / 4;
  return parts % 4 == 0 ? i % halves * 4 + i / halves : i;
}

// The first 16 keys of a task.
template <typename T, int kD, int kB, int kTiles, typename Ahead>
__device__ __forceinline__ void FirstStep(Rows<kD, kTiles>& rows, Scores<kTiles>& x,
                                          References<kTiles>& references, uint32_t k_from,
                                          float scale_log2, bool diagonal, Ahead ahead) {
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) x[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t b[4];
    LoadMatrices(b, PartAt<kD, kB>(k_from, k));
    ScoreStep<T>(rows, x, k, b);
  }
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) x[i / 8][i / 4 % 2][i % 4] *= scale_log2;
  if (diagonal) Mask<kTiles>(x, ahead());
  Raise<true>(rows, x, references);
}

// What scores need before their exponentials, and seldom do: the causal mask, and references raised
// where one is too far above its own.
template <int kD, int kTiles, typename Ahead>
__device__ __forceinline__ void Prepare(Rows<kD, kTiles>& rows, Scores<kTiles>& x,
                                        References<kTiles>& references, bool diagonal,
                                        Ahead ahead) {
  if (__any_sync(~0u, Largest<kTiles>(x) > kRaise || diagonal)) {
    if (diagonal) Mask<kTiles>(x, ahead());
    if (__any_sync(~0u, Largest<kTiles>(x) > kRaise)) Raise<false>(rows, x, references);
  }
}

// Scores of 16 keys, and the products of the 16 before, whose scores are x, with V. `never` is
// false, which the compiler does not know.
template <typename T, int kD, int kB, int kTiles, typename Ahead>
__device__ __forceinline__ void Step(Rows<kD, kTiles>& rows, Scores<kTiles>& x,
                                     References<kTiles>& references, uint32_t k_from,
                                     uint32_t v_from, float scale_log2, bool never, bool diagonal,
                                     Ahead ahead) {
  using P = Plan<kD, kB>;
  constexpr int kParts = kD / 16, kPairs = 4 * kTiles;
  // Products that keep the tensor cores busy while the scores of the step before are looked
  // through.
  constexpr int kEarly = kParts / 4, kLate = kParts - kEarly;
  Scores<kTiles> s = {};
  uint32_t p[kTiles][4];
  // Fragments of two parts, so that one comes while the other is multiplied.
  uint32_t b[2][4];
  LoadMatrices(b[0], PartAt<kD, kB>(k_from, 0));
  LoadMatrices(b[1], PartAt<kD, kB>(k_from, Part(1, kParts)));
#pragma unroll
  for (int at = 0; at < kParts; ++at) {
    ScoreStep<T>(rows, s, Part(at, kParts), b[at % 2]);
    if (at + 2 < kParts) LoadMatrices(b[at % 2], PartAt<kD, kB>(k_from, Part(at + 2, kParts)));
    if (at + 1 == kEarly) Prepare(rows, x, references, diagonal, ahead);
    if (at < kEarly) continue;
#pragma unroll
    for (int i = (at - kEarly) * kPairs / kLate; i < (at - kEarly + 1) * kPairs / kLate; ++i) {
      Exponentiate<T>(rows, x, p, i);
    }
  }
  const References<kTiles> reference = references;
  __syncwarp();  // or else the compiler moves the products with V to the front, and all
                 // exponentials
  LoadTransposed(b[0], PartAt<kD, kB>(v_from, 0) + P::kVBegin);
#pragma unroll
  for (int at = 0; at < kParts; ++at) {
    if (at + 1 < kParts) {
      LoadTransposed(b[(at + 1) % 2], PartAt<kD, kB>(v_from, Part(at + 1, kParts)) + P::kVBegin);
      if (never)
        __trap();  // a branch, or else the compiler puts each load behind the products before it
    }
    ValueStep<T>(rows, p, Part(at, kParts), b[at % 2]);
#pragma unroll
    for (int i = at * kPairs / kParts; i < (at + 1) * kPairs / kParts; ++i) {
      const int t = i / 4, n = i / 2 % 2, r = i % 2;
#pragma unroll
      for (int j = 2 * r; j < 2 * r + 2; ++j) {
        x[t][n][j] = fmaf(s[t][n][j], scale_log2, -reference.of[t][r]);
      }
    }
  }
}

// The last 16 keys of a task.
template <typename T, int kD, int kB, int kTiles, typename Ahead>
__device__ __forceinline__ void LastStep(Rows<kD, kTiles>& rows, Scores<kTiles>& x,
                                         References<kTiles>& references, uint32_t from,
                                         bool diagonal, Ahead ahead) {
  Prepare(rows, x, references, diagonal, ahead);
  uint32_t p[kTiles][4];
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) Exponentiate<T>(rows, x, p, i);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t b[4];
    LoadTransposed(b, PartAt<kD, kB>(from, k) + Plan<kD, kB>::kVBegin);
    ValueStep<T>(rows, p, k, b);
  }
}

// Divides, rounds and stores, 16 bytes a lane: lanes of four exchange what they hold of 32
// channels, so that each has eight in a row. And the LSE.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void Store(const Params& p, const Task& task,
                                      const Rows<kD, kTiles>& rows,
                                      const References<kTiles>& references) {
  const int lane = threadIdx.x % 32, column = lane % 4;
  const int warp_row = threadIdx.x / 32 * 16 * kTiles;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * t + 8 * r + lane / 4;
      const bool ours = row >= task.first && row < task.end;
      const int64_t token = task.q_token + row;
      float sum = rows.sum[t][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float inverse = sum == 0 ? 0 : 1 / sum;
      if (p.lse != nullptr && ours && column == 0) {
        constexpr float kLn2 = 0.693147180559945f;
        p.lse[task.head * p.total_q + token] =
            sum == 0 ? -INFINITY : (references.of[t][r] + log2f(sum)) * kLn2;
      }
      char* to = p.o + task.head * p.o_head + token * p.o_token + column * 16;
#pragma unroll
      for (int n = 0; n < kD / 8; n += 4) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[i] = Pack<T>(rows.o[t][n + i][2 * r] * inverse, rows.o[t][n + i][2 * r + 1] * inverse);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t got = __shfl_xor_sync(~0u, column & 1 ? w[i] : w[i + 1], 1);
          (column & 1 ? w[i] : w[i + 1]) = got;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t got = __shfl_xor_sync(~0u, column & 2 ? w[i] : w[i + 2], 2);
          (column & 2 ? w[i] : w[i + 2]) = got;
        }
        if (ours) *reinterpret_cast<uint4*>(to + n * 16) = uint4{w[0], w[1], w[2], w[3]};
      }
    }
  }
}

template <typename T, int kD, int kB>
__global__ void __launch_bounds__(Plan<kD, kB>::kThreads, Plan<kD, kB>::kBlocksOfSm)
    AttendKernel(const __grid_constant__ Params params) {
  using P = Plan<kD, kB>;
  constexpr int kTiles = P::kTiles;
  extern __shared__ __align__(128) unsigned char rings[];
  // The present task, the next, and the one before, which slower warps still store.
  __shared__ Task tasks[3];
  __shared__ int32_t position;  // of the next task in the order
  __shared__ Next next;
  __shared__ References<kTiles> references[P::kThreads];

  const uint32_t ring = SharedAddress(rings);
  Rows<kD, kTiles> rows;
  Scores<kTiles> x;
  const auto begin = [&](const Task& task) {
    if (task.count == 0) return;
    Load<kD, kB>(params, task, next, ring, 0);
    LoadQueries<kD, kTiles>(params, task, rows.q);
  };
  // The row of a matrix that a lane names to ldmatrix: row lane % 8 of matrix lane / 8. The four of
  // 16 keys by 16 channels come in the order that B fragments have them: in K channels are summed
  // over, in V keys.
  const auto row_at = [&](uint32_t row, uint32_t eight, uint32_t vector) {
    return ring + (eight * 8 + row) * kRowBytes + (vector ^ row) * 16;
  };
  const auto k_row = [&](uint32_t thread) {
    return row_at(thread % 8, thread / 16 % 2, thread / 8 % 2);
  };
  const uint32_t v_ahead =
      row_at(threadIdx.x % 8, threadIdx.x / 8 % 2, threadIdx.x / 16 % 2) - k_row(threadIdx.x);
  // How far the first key of a stage of the diagonal block is ahead of this warp's first query.
  const auto stage_ahead = [&](int stage, uint32_t thread) {
    const int row = thread / 32 * 16 * kTiles;
    return static_cast<int>(stage % P::kStagesOfBlock * P::kKeys) - row;
  };

  if (threadIdx.x == 0) {
    tasks[0] = FindTask<kB>(params, blockIdx.x);
    position = 2 * gridDim.x - 1 - blockIdx.x;  // who begins with a long one goes on with a short
  }
  __syncthreads();
  begin(tasks[0]);
  for (uint32_t turn = 0; tasks[turn].head >= 0;) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) rows.sum[t][r] = 0;
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) rows.o[t][i / 4][i % 4] = 0;
    }

#pragma unroll 1
    for (int stage = 0; stage < tasks[turn].count * P::kStagesOfBlock; ++stage) {
      CopyAsyncWaitAll();
      __syncthreads();
      const int stages = tasks[turn].count * P::kStagesOfBlock;
      if (stage + 1 < stages) Load<kD, kB>(params, tasks[turn], next, ring, stage + 1);

      uint32_t at =
          k_row(Thread(stage)) + static_cast<uint32_t>(stage) * P::kSteps % P::kRing * kStepStride;
      // What this warp sees of the diagonal block.
      const auto steps_of_diagonal = [&](uint32_t thread) {
        return max(0, min(P::kSteps, kTiles - stage_ahead(stage, thread) / kStepKeys));
      };
      const bool diagonal = tasks[turn].diagonal && stage >= stages - P::kStagesOfBlock;
      // Twice the steps that are left, and 1 in the diagonal block.
      int left = 2 * (diagonal ? steps_of_diagonal(Thread(stage)) : P::kSteps) + diagonal;
      const auto ahead_at = [&] {
        const uint32_t thread = Thread(at);
        const int step = steps_of_diagonal(thread) - left / 2;
        return stage_ahead(stage, thread) + step * kStepKeys + static_cast<int>(thread % 4 * 2) -
               static_cast<int>(thread / 4 % 8);
      };
      const auto go_on = [&] {
        left -= 2;
        at += kStepStride;
        if (at >= ring + P::kHalfStride) at -= P::kHalfStride;
      };
      if (stage == 0) {
        FirstStep<T, kD, kB>(rows, x, references[Thread(at)], at, params.scale_log2, diagonal,
                             ahead_at);
        go_on();
      }
#pragma unroll 1
      while (left >= 2) {
        Step<T, kD, kB>(rows, x, references[Thread(at)], at, at + v_ahead, params.scale_log2,
                        params.tasks == 0, left % 2 != 0, [&] { return ahead_at() - kStepKeys; });
        go_on();
      }
      // In the diagonal block a warp is through when what follows is beyond all its queries.
      bool last = stage + 1 == tasks[turn].count * P::kStagesOfBlock;
      if (left % 2 != 0) {
        const int ahead = stage_ahead(stage, Thread(at));
        last = ahead < 16 * kTiles && ahead + P::kKeys >= 16 * kTiles;
      }
      if (last) {
        LastStep<T, kD, kB>(rows, x, references[Thread(at)], at + v_ahead, left % 2 != 0,
                            [&] { return ahead_at() - kStepKeys; });
      }
    }

    // Warp 0 is the first to be through the diagonal block.
    const uint32_t present = turn;
    turn = turn == 2 ? 0 : turn + 1;
    if (threadIdx.x == 0) {
      const int32_t after = 2 * gridDim.x + atomicAdd(params.queue.taken, 1);
      tasks[turn] = FindTask<kB>(params, position);
      position = after;
    }
    __syncthreads();
    begin(tasks[turn]);
    Store<T, kD, kTiles>(params, tasks[present], rows, references[threadIdx.x]);
  }
}

// ---- The table ----------------------------------------------------------------------------------

template <typename T, int kD, int kB>
cudaError_t Launch(const Params& params, int multiprocessors, cudaStream_t stream) {
  using P = Plan<kD, kB>;
  const auto kernel = AttendKernel<T, kD, kB>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kSharedBytes);
  // Left to itself the driver gives L1 what a second block of threads would need.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return error;
  const int blocks = std::min(params.tasks, multiprocessors * P::kBlocksOfSm);
  kernel<<<blocks, P::kThreads, P::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

using Table = KernelTable<64, 96, 128, 256>;

}  // namespace

std::span<const int> AttendSm80HeadDims() { return Table::kHeadDimList; }

bool HasAttendSm80(DType dtype, int head_dim, int block_size) {
  return Table::Has(dtype, head_dim) && (block_size == 64 || block_size == 128);
}

cudaError_t AttendSm80(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream) {
  if (!HasAttendSm80(problem.dtype, problem.head_dim, problem.block_size)) {
    return cudaErrorInvalidValue;
  }
  if (problem.rows == 0) return cudaSuccess;
  const int64_t tasks = problem.q_heads * problem.rows;
  const cudaError_t error = QueueTasks(problem, workspace, multiprocessors, stream);
  if (error != cudaSuccess) return error;

  constexpr int64_t kSize = 2;  // bytes of an element
  Params p = {};
  p.queue = TaskQueueIn(workspace, problem);
  p.tasks = static_cast<int32_t>(tasks);
  p.rows = static_cast<int32_t>(problem.rows);
  p.group = problem.q_heads / problem.kv_heads;
  p.sequence = problem.sequence;
  p.index = problem.index;
  p.index_stride = problem.index_stride;
  p.pages = problem.pages;
  p.q = static_cast<const char*>(problem.q.data);
  p.q_token = problem.q.token_stride * kSize;
  p.q_head = problem.q.head_stride * kSize;
  p.o = static_cast<char*>(problem.o.data);
  p.o_token = problem.o.token_stride * kSize;
  p.o_head = problem.o.head_stride * kSize;
  p.lse = problem.lse;
  p.total_q = problem.total_q;
  if (problem.pages == nullptr) {
    p.k = static_cast<const char*>(problem.k.data);
    p.k_token = static_cast<int32_t>(problem.k.token_stride * kSize);
    p.k_head = problem.k.head_stride * kSize;
    p.v = static_cast<const char*>(problem.v.data);
    p.v_token = static_cast<int32_t>(problem.v.token_stride * kSize);
    p.v_head = problem.v.head_stride * kSize;
    p.k_unit = problem.k.token_stride * kSize * problem.block_size;
    p.v_unit = problem.v.token_stride * kSize * problem.block_size;
  } else {  // [page][kv_head][k|v][page_tokens][d]
    p.k_token = p.v_token = problem.head_dim * static_cast<int32_t>(kSize);
    const int32_t blocks = problem.page_tokens / problem.block_size;
    p.page_shift = problem.page_shift;
    p.page_mask = blocks - 1;
    p.page_units = problem.kv_heads * 2 * blocks;
    p.k_unit = p.v_unit = problem.block_size * problem.head_dim * kSize;
    p.k_head = p.v_head = 2 * blocks * p.k_unit;
    p.k = static_cast<const char*>(problem.arena);
    p.v = p.k + blocks * p.k_unit;
  }
  p.scale_log2 = problem.softmax_scale * 1.4426950408889634f;
  return Table::Launch(problem.dtype, problem.head_dim, [&]<typename T, int kD>() {
    return problem.block_size == 128 ? Launch<T, kD, 128>(p, multiprocessors, stream)
                                     : Launch<T, kD, 64>(p, multiprocessors, stream);
  });
}

}  // namespace prefilld::cuda
