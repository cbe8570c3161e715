// Block-sparse flash attention. A task is one block of queries of one head: it walks its list of
// key blocks with an online softmax in base 2,
//
//   S = (Q scale log2 e) K^T;  m' = max(m, S);  P = 2^(S - m');  l = l 2^(m - m') + sum P;
//   O = O 2^(m - m') + P V;    at the end  o = O / l,  lse = (m + log2 l) ln 2,
//
// everything in F32 whatever the inputs are. Keys (transposed) and values of a kv head are packed
// once and shared by its group of query heads. Key blocks are the outer loop and rows of queries
// the inner, in bands of kBandRows: a key block comes from memory once for a whole block of
// queries, and a band of scores stays in the first-level cache between its two products.
//
// Roofline: 4 d FLOPs for every (query, key) pair, so a dense head costs 2 d S (S + 1) FLOPs. A
// block of 128 x 128 pairs at d = 64 is 4.2 MFLOP over 64 KiB of packed keys and values, 64 FLOPs a
// byte: bound by multiply-adds everywhere. Two 16-lane FMAs a cycle are 64 FLOPs, 234 GFLOP/s a
// core at 3.65 GHz; the two products run at 95% of that, and the softmax between them, 11
// operations a pair on the same ports, costs an eighth of the time at d = 64. attention_benchmark
// measures both.
#include "kernels/cpu/attend_block.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/elementwise.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attend_block.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::cpu::HWY_NAMESPACE {

using F32 = hn::CappedTag<float, 16>;

// A run of keys inside one packed tile: one block, or two neighbours of 64.
struct KeyRun {
  int64_t begin;
  int keys;
};

HWY_INLINE void ScaleRow(float* row, int n, float factor) {
  const F32 d;
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(d))) {
    hn::StoreU(hn::Mul(hn::LoadU(d, row + i), hn::Set(d, factor)), d, row + i);
  }
}

// Scores of `rows` rows become probabilities against the running maximum; where that rises, sum and
// output follow. Columns are a multiple of 16; row r sees the first visible + r of them.
void SoftmaxBand(const QueryBlock& block, const Scratch& scratch, int first_row, int rows,
                 int64_t visible, int columns) {
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int r = 0; r < rows; ++r) {
    float* row = scratch.scores + r * kTileKeys;
    if (visible + r < columns) {
      std::fill(row + visible + r, row + columns, -std::numeric_limits<float>::infinity());
    }
    auto most = hn::LoadU(d, row);
    for (int i = lanes; i < columns; i += lanes) most = hn::Max(most, hn::LoadU(d, row + i));
    float& max = scratch.max[first_row + r];
    float& sum = scratch.sum[first_row + r];
    const float row_max = hn::GetLane(hn::MaxOfLanes(d, most));
    if (row_max > max) {
      const float factor = std::exp2(max - row_max);
      max = row_max;
      sum *= factor;
      ScaleRow(scratch.o + int64_t{first_row + r} * block.d, block.d, factor);
    }
    const auto shift = hn::Set(d, max);
    auto total = hn::Zero(d);
    for (int i = 0; i < columns; i += lanes) {
      const auto p = Exp2(d, hn::Sub(hn::LoadU(d, row + i), shift));
      hn::StoreU(p, d, row + i);
      total = hn::Add(total, p);
    }
    sum += hn::GetLane(hn::SumOfLanes(d, total));
  }
}

// Neither NaN nor infinity in n floats, a multiple of 16.
HWY_INLINE bool AllFinite(const float* values, int64_t n) {
  const F32 d;
  auto zero = hn::Zero(d);  // 0 times anything else
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(hn::Lanes(d))) {
    zero = hn::MulAdd(hn::LoadU(d, values + i), hn::Zero(d), zero);
  }
  return hn::GetLane(hn::SumOfLanes(d, zero)) == 0;
}

// Adds the band's probabilities times values of `depth` keys to the output. On the diagonal the
// first row sees `visible` of them and each row one more than the row before. What a row does not
// see has probability 0, and 0 times NaN or infinity is NaN: such values are kept from it.
void AddValues(const QueryBlock& block, const MatMulArgs& band, int64_t visible) {
  const int64_t hidden = std::max<int64_t>(0, visible);  // from there on for some row
  if (hidden >= band.depth ||
      AllFinite(band.b + hidden * block.d, (band.depth - hidden) * block.d)) {
    return MatMul<true>(band);
  }
  for (int r = 0; r < band.rows; ++r) {
    MatMulArgs row = band;
    row.a += r * band.a_stride;
    row.c += r * band.c_stride;
    row.rows = 1;
    row.depth = static_cast<int>(std::clamp<int64_t>(visible + r, 0, band.depth));
    MatMul<true>(row);
  }
}

// One run of keys for the whole block of queries.
void AttendRun(const QueryBlock& block, const Scratch& scratch, KeyRun run) {
  const float* keys =
      block.keys + run.begin / kTileKeys * (int64_t{block.d} * kTileKeys) + run.begin % kTileKeys;
  const float* values = block.values + run.begin * block.d;
  for (int first = 0; first < block.rows; first += kBandRows) {
    const int rows = std::min(kBandRows, block.rows - first);
    // On the diagonal the band's last row sees the most keys; what is beyond is not computed.
    const int64_t visible = block.position + first + 1 - run.begin;
    const int depth = static_cast<int>(std::min<int64_t>(run.keys, visible + rows - 1));
    const int columns = (depth + 15) / 16 * 16;
    MatMul<false>({.a = scratch.q + int64_t{first} * block.d,
                   .a_stride = block.d,
                   .b = keys,
                   .b_stride = kTileKeys,
                   .c = scratch.scores,
                   .c_stride = kTileKeys,
                   .rows = rows,
                   .depth = block.d,
                   .cols = columns});
    SoftmaxBand(block, scratch, first, rows, visible, columns);
    AddValues(block,
              {.a = scratch.scores,
               .a_stride = kTileKeys,
               .b = values,
               .b_stride = block.d,
               .c = scratch.o + int64_t{first} * block.d,
               .c_stride = block.d,
               .rows = rows,
               .depth = depth,
               .cols = block.d},
              visible);
  }
}

void WriteOutput(const QueryBlock& block, const Scratch& scratch) {
  for (int r = 0; r < block.rows; ++r) {
    const float sum = scratch.sum[r];
    float* row = scratch.o + int64_t{r} * block.d;
    ScaleRow(row, block.d, sum == 0 ? 0.0f : 1 / sum);
    Narrow(row, block.d, block.dtype,
           static_cast<char*>(block.o) +
               r * block.o_stride * static_cast<int64_t>(SizeOf(block.dtype)));
    if (block.lse != nullptr) {
      block.lse[r] = (scratch.max[r] + std::log2(sum)) * 0.69314718f;
    }
  }
}

void AttendBlock(const QueryBlock& block, const Scratch& scratch) {
  WidenRows(block.q, block.dtype, block.q_stride, block.rows, block.d, block.scale, scratch.q,
            block.d);
  std::fill_n(scratch.o, block.rows * block.d, 0.0f);
  std::fill_n(scratch.max, block.rows, -std::numeric_limits<float>::infinity());
  std::fill_n(scratch.sum, block.rows, 0.0f);

  for (int i = 0; i < block.count;) {
    KeyRun run{.begin = int64_t{block.blocks[i]} * block.block_size, .keys = 0};
    do {
      run.keys += block.block_size;
      ++i;
    } while (i < block.count && block.blocks[i] == block.blocks[i - 1] + 1 &&
             run.begin % kTileKeys + run.keys < kTileKeys);
    AttendRun(block, scratch, run);
  }

  WriteOutput(block, scratch);
}

}  // namespace prefilld::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::cpu {

HWY_EXPORT(AttendBlock);

void AttendBlock(const QueryBlock& block, const Scratch& scratch) {
  HWY_DYNAMIC_DISPATCH(AttendBlock)(block, scratch);
}

}  // namespace prefilld::cpu
#endif  // HWY_ONCE
