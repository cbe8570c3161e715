#include "kernels/cpu/tile.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/tile.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::cpu::HWY_NAMESPACE {

using F32 = hn::ScalableTag<float>;
using F32x1 = hn::CappedTag<float, 1>;  // for what is left of a row

template <typename T>
void WidenRowsOf(const T* src, int64_t row_stride, int64_t rows, int d, float scale, float* dst,
                 int64_t dst_stride) {
  const F32 df;
  const F32x1 d1;
  const int lanes = static_cast<int>(hn::Lanes(df));
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = src + row * row_stride;
    float* to = dst + row * dst_stride;
    int c = 0;
    for (; c + lanes <= d; c += lanes) {
      hn::StoreU(hn::Mul(LoadWide(df, from + c), hn::Set(df, scale)), df, to + c);
    }
    for (; c < d; ++c) hn::StoreU(hn::Mul(LoadWide(d1, from + c), hn::Set(d1, scale)), d1, to + c);
  }
}

void WidenRows(const void* src, DType dtype, int64_t row_stride, int64_t rows, int d, float scale,
               float* dst, int64_t dst_stride) {
  switch (dtype) {
    case DType::kF32:
      return WidenRowsOf(static_cast<const float*>(src), row_stride, rows, d, scale, dst,
                         dst_stride);
    case DType::kBF16:
      return WidenRowsOf(static_cast<const hwy::bfloat16_t*>(src), row_stride, rows, d, scale, dst,
                         dst_stride);
    case DType::kF16:
      return WidenRowsOf(static_cast<const hwy::float16_t*>(src), row_stride, rows, d, scale, dst,
                         dst_stride);
  }
}

#if HWY_TARGET != HWY_SCALAR  // which has no shuffles
// Four rows of four become four columns of four.
template <class D>
HWY_INLINE void StoreTransposed(D d4, hn::Vec<D> r0, hn::Vec<D> r1, hn::Vec<D> r2, hn::Vec<D> r3,
                                float* dst) {
  const hn::Repartition<double, D> d2;
  const auto a01 = hn::BitCast(d2, hn::InterleaveLower(d4, r0, r1));  // r00 r10 r01 r11
  const auto a23 = hn::BitCast(d2, hn::InterleaveLower(d4, r2, r3));
  const auto b01 = hn::BitCast(d2, hn::InterleaveUpper(d4, r0, r1));  // r02 r12 r03 r13
  const auto b23 = hn::BitCast(d2, hn::InterleaveUpper(d4, r2, r3));
  hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, a01, a23)), d4, dst);
  hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, a01, a23)), d4, dst + kTileKeys);
  hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, b01, b23)), d4, dst + 2 * kTileKeys);
  hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, b01, b23)), d4, dst + 3 * kTileKeys);
}
#endif

template <typename T>
void PackKeysOf(const T* src, int64_t row_stride, int keys, int d, float* dst) {
  const F32x1 d1;
  int key = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 4> d4;
  for (; key + 4 <= keys; key += 4) {
    const T* row = src + key * row_stride;
    int c = 0;
    for (; c + 4 <= d; c += 4) {
      StoreTransposed(d4, LoadWide(d4, row + c), LoadWide(d4, row + row_stride + c),
                      LoadWide(d4, row + 2 * row_stride + c),
                      LoadWide(d4, row + 3 * row_stride + c), dst + c * kTileKeys + key);
    }
    for (; c < d; ++c) {
      for (int i = 0; i < 4; ++i) {
        hn::StoreU(LoadWide(d1, row + i * row_stride + c), d1, dst + c * kTileKeys + key + i);
      }
    }
  }
#endif
  for (; key < keys; ++key) {
    for (int c = 0; c < d; ++c) {
      hn::StoreU(LoadWide(d1, src + key * row_stride + c), d1, dst + c * kTileKeys + key);
    }
  }
  for (int c = 0; c < d; ++c) {
    std::fill(dst + c * kTileKeys + keys, dst + (c + 1) * kTileKeys, 0.0f);
  }
}

void PackKeysTransposed(const void* src, DType dtype, int64_t row_stride, int keys, int d,
                        float* dst) {
  switch (dtype) {
    case DType::kF32:
      return PackKeysOf(static_cast<const float*>(src), row_stride, keys, d, dst);
    case DType::kBF16:
      return PackKeysOf(static_cast<const hwy::bfloat16_t*>(src), row_stride, keys, d, dst);
    case DType::kF16:
      return PackKeysOf(static_cast<const hwy::float16_t*>(src), row_stride, keys, d, dst);
  }
}

void ScoreTile(const float* q, int64_t q_stride, int rows, const float* kt, int d, float* scores,
               int64_t scores_stride) {
  MatMul<false>({.a = q,
                 .a_stride = q_stride,
                 .b = kt,
                 .b_stride = kTileKeys,
                 .c = scores,
                 .c_stride = scores_stride,
                 .rows = rows,
                 .depth = d,
                 .cols = kTileKeys});
}

float RowMax(const float* row, int n) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  float most = row[0];
  int i = 0;
  if (n >= lanes) {
    auto max = hn::LoadU(df, row);
    for (i = lanes; i + lanes <= n; i += lanes) max = hn::Max(max, hn::LoadU(df, row + i));
    most = hn::GetLane(hn::MaxOfLanes(df, max));
  }
  for (; i < n; ++i) most = std::max(most, row[i]);
  return most;
}

float ExpRowInPlace(float* row, int n, float shift) {
  const F32 df;
  const int lanes = static_cast<int>(hn::Lanes(df));
  const auto vshift = hn::Set(df, shift);
  auto sum = hn::Zero(df);
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto e = Exp(df, hn::Sub(hn::LoadU(df, row + i), vshift));
    hn::StoreU(e, df, row + i);
    sum = hn::Add(sum, e);
  }
  if (i < n) {
    HWY_ALIGN float rest[hn::MaxLanes(df)];
    std::fill(rest, rest + lanes, -std::numeric_limits<float>::infinity());
    std::copy(row + i, row + n, rest);
    const auto e = Exp(df, hn::Sub(hn::Load(df, rest), vshift));
    hn::Store(e, df, rest);
    std::copy(rest, rest + (n - i), row + i);
    sum = hn::Add(sum, e);
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

const char* InstructionSet() { return hwy::TargetName(HWY_TARGET); }

}  // namespace prefilld::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::cpu {

HWY_EXPORT(WidenRows);
HWY_EXPORT(PackKeysTransposed);
HWY_EXPORT(ScoreTile);
HWY_EXPORT(RowMax);
HWY_EXPORT(ExpRowInPlace);
HWY_EXPORT(InstructionSet);

void WidenRows(const void* src, DType dtype, int64_t row_stride, int64_t rows, int d, float scale,
               float* dst, int64_t dst_stride) {
  HWY_DYNAMIC_DISPATCH(WidenRows)(src, dtype, row_stride, rows, d, scale, dst, dst_stride);
}

void PackKeysTransposed(const void* src, DType dtype, int64_t row_stride, int keys, int d,
                        float* dst) {
  HWY_DYNAMIC_DISPATCH(PackKeysTransposed)(src, dtype, row_stride, keys, d, dst);
}

void ScoreTile(const float* q, int64_t q_stride, int rows, const float* kt, int d, float* scores,
               int64_t scores_stride) {
  HWY_DYNAMIC_DISPATCH(ScoreTile)(q, q_stride, rows, kt, d, scores, scores_stride);
}

float RowMax(const float* row, int n) { return HWY_DYNAMIC_DISPATCH(RowMax)(row, n); }

float ExpRowInPlace(float* row, int n, float shift) {
  return HWY_DYNAMIC_DISPATCH(ExpRowInPlace)(row, n, shift);
}

const char* InstructionSet() { return HWY_DYNAMIC_DISPATCH(InstructionSet)(); }

}  // namespace prefilld::cpu
#endif  // HWY_ONCE
