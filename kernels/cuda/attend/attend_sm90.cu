// Stage 3 on Hopper (sm_90a): block-sparse causal attention, TMA loads, wgmma products, one
// persistent thread block an SM.
//
// A task is one (query head, block of 128 queries). Three warpgroups: one loads, two compute, 64
// queries each, against the same blocks of keys. In every step a consumer issues S' = Q K'^T of the
// next block and O += P V of the present one, and computes the softmax of S' while the second
// product runs; the two consumers take turns at the tensor cores, so that one's softmax hides
// behind the other's products (FlashAttention-3, Shah et al. 2024, section 3).
//
// Roofline at d = 128: 8.4 MFLOP a pair of blocks, 2.05 K cycles of the tensor cores at their peak,
// against 16 K exponentials (1.02 K cycles, hidden) and 64 KB of K and V from L2 (32 bytes a cycle,
// hidden). So the floor is executed FLOPs over the tensor cores' rate, and power: on an H100 long
// rows reach 660 to 730 TFLOP/s, where cuDNN's dense attention reaches 550 to 655. A step takes
// some 2.3 K cycles, a change of task 1.5 K more: rows of six blocks reach 550.
#include <climits>

#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/attend/task_queue.h"
#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/instructions/barrier.cuh"
#include "kernels/cuda/instructions/mma.cuh"
#include "kernels/cuda/instructions/tma.cuh"
#include "kernels/cuda/instructions/wgmma.cuh"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/pages.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kBlock = 128;    // queries of a task, keys of a step: the block of the index
constexpr int kRows = 64;      // queries of a consumer: the M of wgmma
constexpr int kWarpRows = 16;  // of a warp of them
constexpr int kConsumers = 2;  // warpgroups that compute
constexpr int kThreads = (1 + kConsumers) * 128;
constexpr int kHalf = kBlock * 64;  // elements of 64 channels of a block: what one TMA box holds
// Named barriers: whose turn it is at the tensor cores (two), both consumers.
constexpr int kTurn = 1, kBoth = 3;
// Tasks known ahead: the loader looks one further than the consumers, and the scheduler holds one
// more. More would wait here while other multiprocessors idle.
constexpr int kTasks = 2;
// 65,536 registers over three warpgroups: the loader needs few, S, O and P of a consumer many.
constexpr int kLoaderRegisters = 40;
constexpr int kConsumerRegisters = 232;

// Scores above the reference by up to this (powers of two) leave it alone: P is at most 256, and so
// inside what FP16 holds.
constexpr float kRaise = 8;
// The reference of a row whose first scores are all -infinity: a later one that is not far below
// raises it.
constexpr float kUnset = -4096;

// One (head, row of blocks), looked up once for the whole block of threads.
struct Task {
  int32_t head;        // -1: there are no more
  int32_t count;       // blocks of keys
  int32_t q_token;     // of row 0 of the tile; rows outside [first, end) are none of ours
  int32_t first, end;  // rows of the tile
  int32_t key_begin;   // row of the sequence's first key in k, or its first entry in pages
  int32_t diagonal;    // the last block is that of the queries
  int32_t tail;        // its keys that exist
  const uint16_t* index;
};

template <int D>
struct Plan {
  static constexpr int kHalves = D / 64;
  static constexpr int kStages = D == 128 ? 2 : 4;  // 64 KB of keys and 64 KB of values, whatever D
  static constexpr int kTile = kBlock * D;          // elements
};

template <typename T, int D>
struct alignas(1024) Shared {
  using P = Plan<D>;
  T q[2][P::kTile];  // of this task and the next
  T k[P::kStages][P::kTile];
  T v[P::kStages][P::kTile];
  T o[P::kTile];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[P::kStages], k_empty[P::kStages];
  uint64_t v_full[P::kStages], v_empty[P::kStages];
  uint64_t task_full[kTasks], task_empty[kTasks];
  Task task[kTasks];
  int32_t kv_row[kTasks][32];  // of its last 32 blocks, the last one first
};

// A place in a ring of barriers, and the parity of the round.
template <int kSize>
struct Place {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Next() {
    if (++at == kSize) {
      at = 0;
      parity ^= 1;
    }
  }
};

struct Params {
  Problem problem;
  TaskQueue queue;
  int32_t tasks;
  float scale_log2;  // softmax_scale / ln 2
};

// Where blocks of keys lie, as rows of the tensor map of K: lane by lane that of block `at` of the
// index, and 0 for none. Those of V are the same rows of its map, or in pages page_tokens behind.
__device__ __forceinline__ int32_t KvRow(const Problem& p, const Task& task, int32_t at) {
  if (at < 0) return 0;
  const int32_t block = task.index[at];
  if (p.pages == nullptr) return task.key_begin + block * kBlock;
  const int32_t head = task.head / (p.q_heads / p.kv_heads);
  return static_cast<int32_t>(PagedRow(p, task.key_begin, block * kBlock, head));
}

__device__ Task FindTask(const Params& params, int32_t at) {
  const Problem& p = params.problem;
  Task task = {};
  task.head = -1;
  if (at >= params.tasks) return task;
  const QueuedTask queued = params.queue.task[at];
  const Sequence s = p.sequence[queued.sequence];
  const int32_t block = s.first_q_block + queued.row - s.row_begin;
  const int32_t begin = block * kBlock;  // absolute position
  task.head = queued.head;
  task.count = queued.count;
  task.index = p.index + (queued.head * p.rows + queued.row) * p.index_stride;
  task.q_token = s.q_begin + begin - s.prefix;
  task.first = max(0, s.prefix - begin);
  task.end = min(kBlock, s.sk - begin);
  task.key_begin = p.pages == nullptr ? s.k_begin : s.page_begin;
  task.tail = task.end;
  task.diagonal = task.count > 0 && task.index[task.count - 1] == block;
  return task;
}

// The warp that finds tasks, and the blocks of each, before there is a place for them: a counter,
// the queue, the index and the pages, one after the other, take as long as two blocks of keys.
template <typename T, int D>
__device__ void RunScheduler(const Params& params, Shared<T, D>& shared) {
  const int lane = threadIdx.x % 32;
  Place<kTasks> place;
  for (int32_t at = blockIdx.x;;) {
    const Task task = FindTask(params, at);
    const int32_t row = KvRow(params.problem, task, task.count - 1 - lane);
    BarrierWait(&shared.task_empty[place.at], place.parity ^ 1);
    if (lane == 0) shared.task[place.at] = task;
    shared.kv_row[place.at][lane] = row;
    BarrierArrive(&shared.task_full[place.at]);
    if (task.head < 0) return;
    place.Next();
    if (lane == 0) at = gridDim.x + atomicAdd(params.queue.taken, 1);
    at = __shfl_sync(~0u, at, 0);
  }
}

// The one warp that loads: K and V of a task's blocks, the last block first; early among them Q of
// the next task. K runs one block ahead of V, across tasks too: consumers need it so, and neither
// waits for the other's place.
template <typename T, int D>
__device__ void RunLoader(const Params& params, Shared<T, D>& shared, const CUtensorMap& q_map,
                          const CUtensorMap& k_map, const CUtensorMap& v_map) {
  using P = Plan<D>;
  constexpr uint32_t kTileBytes = P::kTile * sizeof(T);
  const Problem& p = params.problem;
  const bool paged = p.pages != nullptr;
  const int lane = threadIdx.x % 32;
  Place<kTasks> at_task;
  Place<2> at_q;
  Place<P::kStages> at_k, at_v;

  const auto load = [&](const CUtensorMap& map, T* to, uint64_t* full, uint64_t* empty,
                        uint32_t parity, int head, int row) {
    if (lane != 0) return;
    BarrierWait(empty, parity ^ 1);
    BarrierArriveExpect(full, kTileBytes);
    for (int half = 0; half < P::kHalves; ++half) {
      TmaLoad(&map, to + half * kHalf, full, half * 64, head, row);
    }
  };
  int32_t late_head = -1, late_row = 0;  // of the V that is still to come
  const auto load_late = [&] {
    if (late_head < 0) return;
    load(v_map, shared.v[at_v.at], &shared.v_full[at_v.at], &shared.v_empty[at_v.at], at_v.parity,
         late_head, late_row);
    at_v.Next();
    late_head = -1;
  };
  Task task, next;
  int32_t rows, next_rows;  // lane by lane, of 32 blocks
  // Takes the next task and loads its Q.
  const auto take_next = [&] {
    BarrierWait(&shared.task_full[at_task.at], at_task.parity);
    next = shared.task[at_task.at];
    next_rows = shared.kv_row[at_task.at][lane];
    BarrierArrive(&shared.task_empty[at_task.at]);
    at_task.Next();
    if (next.head < 0 || next.count == 0) return;
    load(q_map, shared.q[at_q.at], &shared.q_full[at_q.at], &shared.q_empty[at_q.at], at_q.parity,
         next.head, next.q_token);
    at_q.Next();
  };

  for (take_next(); next.head >= 0;) {
    task = next;
    rows = next_rows;
    const int32_t kv_head = paged ? 0 : task.head / (p.q_heads / p.kv_heads);
    for (int32_t i = 0; i < task.count; ++i) {
      if (i > 0 && i % 32 == 0) rows = KvRow(p, task, task.count - 1 - i - lane);
      const int32_t row = __shfl_sync(~0u, rows, i % 32);
      load(k_map, shared.k[at_k.at], &shared.k_full[at_k.at], &shared.k_empty[at_k.at], at_k.parity,
           kv_head, row);
      at_k.Next();
      load_late();
      late_head = kv_head;
      late_row = paged ? row + p.page_tokens : row;
      // By then consumers are through with the task before, and its Q with them.
      if (i == min(P::kStages, task.count - 1)) take_next();
    }
    if (task.count == 0) {  // consumers take the next one when they have all of what was before
      load_late();
      take_next();
    }
  }
  load_late();
}

// The softmax of the two rows of a thread. Element j of a consumer's S or O lies in row
// 16 warp + lane / 4 (+ 8 where j & 2) and column 8 (j / 4) + 2 (lane % 4) + j % 2 (PTX, wgmma's D
// fragment).
//
// Exponents are relative to a reference of the row, which is raised only where a score exceeds it
// by more than kRaise: a vote of the warp, rare after the first block. So most steps exchange
// nothing between lanes and leave O alone.
struct Softmax {
  float reference[2];     // in powers of two
  float sum[2] = {0, 0};  // of this thread's columns only
  bool raised = false;    // by the last step: O is to be multiplied with `correction`
  float correction[2];

  // The largest of each row in this thread's columns, by eight chains that do not wait for each
  // other.
  static __device__ __forceinline__ void Largest(const float (&s)[64], float (&largest)[2]) {
    float top[8];
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // pairs of neighbours, of the rows in turn
      const int at = 4 * (i / 2) + 2 * (i % 2);
      const float pair = fmaxf(s[at], s[at + 1]);
      top[i % 8] = i < 8 ? pair : fmaxf(top[i % 8], pair);
    }
    largest[0] = fmaxf(fmaxf(top[0], top[2]), fmaxf(top[4], top[6]));
    largest[1] = fmaxf(fmaxf(top[1], top[3]), fmaxf(top[5], top[7]));
  }
  static __device__ __forceinline__ float OfRow(float largest) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  }
  // s becomes exp2(s * scale_log2 - reference).
  __device__ __forceinline__ void Exponentiate(float (&s)[64], float scale_log2) {
#pragma unroll
    for (int j = 0; j < 64; ++j) {
      const int r = j / 2 % 2;
      s[j] = Exp2(fmaf(s[j], scale_log2, -reference[r]));
      sum[r] += s[j];
    }
  }
  // Of a task's first block.
  __device__ __forceinline__ void First(float (&s)[64], float scale_log2) {
    float largest[2];
    Largest(s, largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = OfRow(largest[r]);
      reference[r] = largest[r] == -INFINITY ? kUnset : largest[r] * scale_log2;
    }
    Exponentiate(s, scale_log2);
  }
  __device__ __forceinline__ void Step(float (&s)[64], float scale_log2) {
    float above[2];
    Largest(s, above);
#pragma unroll
    for (int r = 0; r < 2; ++r) above[r] = fmaf(above[r], scale_log2, -reference[r]);
    raised = __any_sync(~0u, fmaxf(above[0], above[1]) > kRaise);
    if (raised) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // The other rows of the warp stay as they are: some may be those of another sequence.
        const float top = OfRow(above[r]), by = top > kRaise ? top : 0;
        reference[r] += by;
        correction[r] = Exp2(-by);
        sum[r] *= correction[r];
      }
    }
    Exponentiate(s, scale_log2);
  }
};

template <typename T>
__device__ __forceinline__ void ToFragments(const float (&s)[64], uint32_t (&p)[8][4]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int x = 0; x < 4; ++x) p[k][x] = Pack<T>(s[8 * k + 2 * x], s[8 * k + 2 * x + 1]);
  }
}

template <int N>
__device__ __forceinline__ void Scale(float (&o)[N], const float (&by)[2]) {
#pragma unroll
  for (int j = 0; j < N; ++j) o[j] *= by[j / 2 % 2];
}

template <typename T, int D>
__device__ __forceinline__ void IssueQk(float (&s)[64], const T* q, const T* k) {
  const Matrix a(q, 16), b(k, 16);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    // 16 channels are 32 bytes of a swizzled row; 64 channels fill it.
    const uint32_t bytes = (step / 4) * kHalf * sizeof(T) + (step % 4) * 32;
    WgmmaQk<T>(s, a.Descriptor(bytes), b.Descriptor(bytes), step != 0);
  }
  WgmmaCommit();
}

template <typename T, int D>
__device__ __forceinline__ void IssuePv(float (&o)[D / 2], const uint32_t (&p)[8][4], const T* v) {
  const Matrix b(v, kHalf * sizeof(T));
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    WgmmaPv<T>(o, p[step], b.Descriptor(step * 2048), true);
  }
  WgmmaCommit();
}

// Causal, inside the diagonal block: column c of row r is seen where c <= r; `row` is that of s[0].
// Minima with infinity or -infinity, made from the sign of a difference: no predicates, which would
// be waited for, and no branches.
__device__ __forceinline__ void MaskDiagonal(float (&s)[64], int row) {
  int seen = row - 2 * (threadIdx.x % 4);  // from the thread's first column, in its first row
  asm volatile("" : "+r"(seen));  // or else what follows from it waits in registers for every task
#pragma unroll
  for (int n = -1; n < 16; ++n) {  // eight rows down is as eight columns back
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int sign = (seen - (8 * n + x)) & INT_MIN;
      const float most = __int_as_float(sign | 0x7f800000);
      if (n >= 0) s[4 * n + x] = fminf(s[4 * n + x], most);
      if (n < 15) s[4 * (n + 1) + 2 + x] = fminf(s[4 * (n + 1) + 2 + x], most);
    }
  }
}

// Values behind the end of the sequence are somebody else's: zero times NaN would be NaN.
template <typename T, int D>
__device__ void ClearTail(T* v, int tail, int thread) {
  constexpr int kVectors = D / 8;  // 16 bytes each; a swizzle permutes them within a row
  for (int i = tail * kVectors + thread; i < kBlock * kVectors; i += kConsumers * 128) {
    const int row = i / kVectors, vector = i % kVectors;
    T* to = v + (vector / 8) * kHalf + row * 64 + (vector % 8) * 8;
    *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
  }
  FenceAsyncProxy();
}

// Divides, rounds, and stores whole rows by way of shared memory; and the LSE. Every warp stores
// its own 16 rows and waits for no other.
template <typename T, int D>
__device__ __forceinline__ void StoreOutput(const Params& params, const Task& task, int row,
                                            const float (&o)[D / 2], const Softmax& softmax,
                                            T* staged, const CUtensorMap& o_map) {
  const Problem& p = params.problem;
  const int lane = threadIdx.x % 32;
  if (lane == 0) TmaStoreWait();  // what was staged last is read
  __syncwarp();
  float sum[2], inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = softmax.sum[r];
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    inverse[r] = sum[r] == 0 ? 0 : __fdividef(1, sum[r]);
  }
  // Halves of 64 channels, each in rows of 128 bytes swizzled as TMA has them.
  constexpr int kHalfRows = kWarpRows * 64;
#pragma unroll
  for (int j = 0; j < D / 2; j += 8) {  // 16 channels: four matrices of 8 x 8
    const int at = lane % 16, vector = j / 4 + lane / 16;
    T* to = staged + (vector / 8) * kHalfRows + at * 64 + ((vector ^ at) & 7) * 8;
    StoreMatrices(to, Pack<T>(o[j] * inverse[0], o[j + 1] * inverse[0]),
                  Pack<T>(o[j + 2] * inverse[1], o[j + 3] * inverse[1]),
                  Pack<T>(o[j + 4] * inverse[0], o[j + 5] * inverse[0]),
                  Pack<T>(o[j + 6] * inverse[1], o[j + 7] * inverse[1]));
  }
  if (task.first <= row && task.end >= row + kWarpRows) {
    FenceAsyncProxy();
    __syncwarp();
    if (lane == 0) {
      for (int half = 0; half < D / 64; ++half) {
        TmaStore(&o_map, staged + half * kHalfRows, half * 64, task.head, task.q_token + row);
      }
      TmaStoreCommit();
    }
  } else {
    __syncwarp();
    constexpr int kVectors = D / 8;  // of 16 bytes
    for (int i = lane; i < kWarpRows * kVectors; i += 32) {
      const int at = i / kVectors, vector = i % kVectors;
      if (row + at < task.first || row + at >= task.end) continue;
      T* to = static_cast<T*>(p.o.data) +
              (static_cast<int64_t>(task.q_token) + row + at) * p.o.token_stride +
              task.head * p.o.head_stride + vector * 8;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(
          staged + (vector / 8) * kHalfRows + at * 64 + ((vector ^ at) & 7) * 8);
    }
  }
  if (p.lse == nullptr || lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + lane / 4 + 8 * r;
    if (at < task.first || at >= task.end) continue;
    constexpr float kLn2 = 0.693147180559945f;
    p.lse[static_cast<int64_t>(task.head) * p.total_q + task.q_token + at] =
        sum[r] == 0 ? -INFINITY : (softmax.reference[r] + __log2f(sum[r])) * kLn2;
  }
}

// The steps of all tasks are one stream: the first product of a task is issued together with the
// last one of the task before, so that short rows keep the tensor cores as busy as long ones.
template <typename T, int D>
__device__ void RunConsumer(const Params& params, Shared<T, D>& shared, const CUtensorMap& o_map,
                            int consumer) {
  using P = Plan<D>;
  const int thread = threadIdx.x % 128;
  const int row = consumer * kRows + thread / 32 * kWarpRows;  // of the tile: this warp's first
  const int my_turn = kTurn + consumer, other_turn = kTurn + 1 - consumer;
  T* const staged = shared.o + row * D;
  Place<kTasks> at_task;
  Place<2> at_q;
  Place<P::kStages> at_k, at_v;

  // Takes the next task that has blocks; those without are stored as zeros on the way.
  const auto next_task = [&] {
    for (;;) {
      BarrierWait(&shared.task_full[at_task.at], at_task.parity);
      const Task task = shared.task[at_task.at];
      BarrierArrive(&shared.task_empty[at_task.at]);
      at_task.Next();
      if (task.head < 0 || task.count > 0) return task;
      float zeros[D / 2] = {};
      StoreOutput<T, D>(params, task, row, zeros, Softmax(), staged, o_map);
    }
  };
  Task task = next_task();
  if (task.head < 0) {
    if (thread % 32 == 0) TmaStoreWait();
    return;
  }

  float s[64], o[D / 2];
  uint32_t fragments[8][4];
  const T* q = shared.q[at_q.at] + consumer * kRows * 64;
  // S of the task's first block, whose values are at `v`, becomes P.
  const auto begin = [&](const Place<P::kStages>& v) {
    if (task.diagonal) {
      MaskDiagonal(s, row + thread % 32 / 4);
      if (task.tail < kBlock) {
        BarrierWait(&shared.v_full[v.at], v.parity);
        ClearTail<T, D>(shared.v[v.at], task.tail, consumer * 128 + thread);
        NamedSync(kBoth, 256);
      }
    }
    Softmax softmax;
    softmax.First(s, params.scale_log2);
    return softmax;
  };

  BarrierWait(&shared.q_full[at_q.at], at_q.parity);
  BarrierWait(&shared.k_full[at_k.at], at_k.parity);
  if (consumer == 1) NamedArrive(other_turn, 256);  // the first consumer begins
  NamedSync(my_turn, 256);
  WgmmaFence();
  IssueQk<T, D>(s, q, shared.k[at_k.at]);
  NamedArrive(other_turn, 256);
  WgmmaWait<0>();
  if (thread == 0) BarrierArrive(&shared.k_empty[at_k.at]);
  at_k.Next();
  Softmax softmax = begin(at_v);

  for (;;) {
    ToFragments<T>(s, fragments);
#pragma unroll
    for (int j = 0; j < D / 2; ++j) o[j] = 0;

#pragma unroll 1
    for (int32_t i = 1; i < task.count; ++i) {
      BarrierWait(&shared.k_full[at_k.at], at_k.parity);
      NamedSync(my_turn, 256);
      WgmmaFence();
      IssueQk<T, D>(s, q, shared.k[at_k.at]);
      if (softmax.raised) Scale(o, softmax.correction);
      BarrierWait(&shared.v_full[at_v.at], at_v.parity);
      WgmmaFence();
      IssuePv<T, D>(o, fragments, shared.v[at_v.at]);
      NamedArrive(other_turn, 256);
      WgmmaWait<1>();
      if (thread == 0) BarrierArrive(&shared.k_empty[at_k.at]);
      at_k.Next();
      softmax.Step(s, params.scale_log2);
      WgmmaWait<0>();
      if (thread == 0) BarrierArrive(&shared.v_empty[at_v.at]);
      at_v.Next();
      ToFragments<T>(s, fragments);
    }
    if (thread == 0) BarrierArrive(&shared.q_empty[at_q.at]);
    at_q.Next();

    // The same once more, but that S is of the next task. As a case of the loop above it would make
    // ptxas wait for every single product.
    const Task done = task;
    const Softmax of_done = softmax;
    task = next_task();
    const bool more = task.head >= 0;
    if (more) {
      q = shared.q[at_q.at] + consumer * kRows * 64;
      BarrierWait(&shared.q_full[at_q.at], at_q.parity);
      BarrierWait(&shared.k_full[at_k.at], at_k.parity);
    }
    NamedSync(my_turn, 256);
    WgmmaFence();
    // Without a next task this multiplies what lies there, and nobody reads the product.
    IssueQk<T, D>(s, q, shared.k[at_k.at]);
    if (softmax.raised) Scale(o, softmax.correction);
    BarrierWait(&shared.v_full[at_v.at], at_v.parity);
    WgmmaFence();
    IssuePv<T, D>(o, fragments, shared.v[at_v.at]);
    NamedArrive(other_turn, 256);
    WgmmaWait<1>();
    if (more) {
      if (thread == 0) BarrierArrive(&shared.k_empty[at_k.at]);
      at_k.Next();
      Place<P::kStages> next_v = at_v;
      next_v.Next();
      softmax = begin(next_v);
    }
    WgmmaWait<0>();
    if (thread == 0) BarrierArrive(&shared.v_empty[at_v.at]);
    at_v.Next();
    StoreOutput<T, D>(params, done, row, o, of_done, staged, o_map);
    if (!more) break;
  }
  if (thread % 32 == 0) TmaStoreWait();
}

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    AttendKernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map,
                 const __grid_constant__ CUtensorMap o_map) {
  using P = Plan<D>;
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<T, D>& shared = *reinterpret_cast<Shared<T, D>*>(memory);
  if (threadIdx.x == 0) {
    TmaPrefetch(&q_map);
    TmaPrefetch(&k_map);
    TmaPrefetch(&v_map);
    TmaPrefetch(&o_map);
    for (int i = 0; i < 2; ++i) {
      BarrierInit(&shared.q_full[i], 1);
      BarrierInit(&shared.q_empty[i], kConsumers);
    }
    for (int i = 0; i < P::kStages; ++i) {
      BarrierInit(&shared.k_full[i], 1);
      BarrierInit(&shared.k_empty[i], kConsumers);
      BarrierInit(&shared.v_full[i], 1);
      BarrierInit(&shared.v_empty[i], kConsumers);
    }
    for (int i = 0; i < kTasks; ++i) {
      BarrierInit(&shared.task_full[i], 32);
      BarrierInit(&shared.task_empty[i], 32 + kConsumers * 128);  // all who read it
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoaderRegisters));
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      RunLoader<T, D>(params, shared, q_map, k_map, v_map);
    } else if (warp == 1) {
      RunScheduler<T, D>(params, shared);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    RunConsumer<T, D>(params, shared, o_map, warpgroup - 1);
  }
}

// Boxes of 64 channels, one head, some rows, in rows of 128 bytes swizzled as wgmma reads them.
// [rows, heads, d] with strides in elements.
bool EncodeMap(CUtensorMap* map, DType dtype, const void* data, int d, int64_t heads, int64_t rows,
               int64_t head_stride, int64_t row_stride, int box_rows) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {  // of the driver, so that nothing links against it
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(head_stride) * 2,
                                static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1, 1};
  return encode(map,
                dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                3, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, int D>
cudaError_t Launch(const Problem& problem, void* workspace, int multiprocessors,
                   cudaStream_t stream) {
  Params params;
  params.problem = problem;
  params.queue = TaskQueueIn(workspace, problem);
  params.tasks = static_cast<int32_t>(problem.rows * problem.q_heads);
  params.scale_log2 = problem.softmax_scale * 1.44269504f;

  CUtensorMap q_map, k_map, v_map, o_map;
  const int64_t paged_rows = problem.arena_pages * problem.kv_heads * 2 * problem.page_tokens;
  const auto encode_kv = [&](CUtensorMap* map, const Tensor& x) {
    return problem.pages != nullptr
               ? EncodeMap(map, problem.dtype, problem.arena, D, 1, paged_rows, D, D, kBlock)
               : EncodeMap(map, problem.dtype, x.data, D, problem.kv_heads, problem.total_k,
                           x.head_stride, x.token_stride, kBlock);
  };
  const auto encode_q = [&](CUtensorMap* map, const Tensor& x, int box_rows) {
    return EncodeMap(map, problem.dtype, x.data, D, problem.q_heads, problem.total_q, x.head_stride,
                     x.token_stride, box_rows);
  };
  if (!encode_q(&q_map, problem.q, kBlock) || !encode_q(&o_map, problem.o, kWarpRows) ||
      !encode_kv(&k_map, problem.k) || !encode_kv(&v_map, problem.v)) {
    return cudaErrorInvalidValue;
  }
  cudaError_t error = QueueTasks(problem, workspace, multiprocessors, stream);
  const int bytes = sizeof(Shared<T, D>);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(AttendKernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes);
  }
  if (error != cudaSuccess) return error;
  const int blocks = params.tasks < multiprocessors ? params.tasks : multiprocessors;
  AttendKernel<T, D><<<blocks, kThreads, bytes, stream>>>(params, q_map, k_map, v_map, o_map);
  return cudaGetLastError();
}

using Table = KernelTable<64, 128>;

}  // namespace

bool HasAttendSm90(DType dtype, int head_dim, int block_size) {
  return Table::Has(dtype, head_dim) && block_size == kBlock;
}

cudaError_t AttendSm90(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream) {
  if (!HasAttendSm90(problem.dtype, problem.head_dim, problem.block_size)) {
    return cudaErrorInvalidValue;
  }
  if (problem.rows == 0) return cudaSuccess;
  return Table::Launch(problem.dtype, problem.head_dim, [&]<typename T, int D>() {
    return Launch<T, D>(problem, workspace, multiprocessors, stream);
  });
}

}  // namespace prefilld::cuda
