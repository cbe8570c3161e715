// The vector loops behind tile.h, for kernels that inline them: loads that widen, exponentials, and
// the one register-blocked matrix product. Included once per instruction set (Highway).
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/tensor.h"

#if defined(PREFILLD_KERNELS_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PREFILLD_KERNELS_CPU_TILE_INL_H_
#undef PREFILLD_KERNELS_CPU_TILE_INL_H_
#else
#define PREFILLD_KERNELS_CPU_TILE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace prefilld::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// d is a tag of F32 lanes; the loads read as many elements of the source type.
template <class D>
HWY_INLINE hn::Vec<D> LoadWide(D d, const float* from) {
  return hn::LoadU(d, from);
}
template <class D, typename Half>
HWY_INLINE hn::Vec<D> LoadWide(D d, const Half* from) {
  const hn::Rebind<Half, D> half;
  const hn::Rebind<uint16_t, D> bits;  // the F16 and BF16 of Highway have no loads of their own
  return hn::PromoteTo(d,
                       hn::BitCast(half, hn::LoadU(bits, reinterpret_cast<const uint16_t*>(from))));
}

// exp(x) within 1.2e-7 of itself and exactly 1 at 0; 0 below -87, exp(88) above 88, NaN at NaN.
// x = k ln 2 + r; e^r = 1 + r + r^2 P(r), P fitted for the least relative error (3e-9).
template <class D>
HWY_INLINE hn::Vec<D> Exp(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  const auto clamped = hn::Min(hn::Set(d, 88.0f), x);
  const auto k = hn::NearestInt(hn::Mul(clamped, hn::Set(d, 1.44269504f)));
  const auto kf = hn::ConvertTo(d, k);
  auto r = hn::NegMulAdd(kf, hn::Set(d, 0.693359375f), clamped);  // ln 2 in two parts, the first
  r = hn::NegMulAdd(kf, hn::Set(d, -2.12194440e-4f), r);          // exact for every k
  auto p = hn::Set(d, 0.00138146f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.00836872f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.04166839f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.16666521f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.49999993f));
  p = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), hn::Set(d, 1.0f));
  const auto scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(k)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), scaled);
}

// 2^x within 2e-7 of itself and exactly 1 at 0; 0 below -126. For x <= 0, as softmax has them.
template <class D>
HWY_INLINE hn::Vec<D> Exp2(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  const auto k = hn::NearestInt(x);
  const auto r = hn::Sub(x, hn::ConvertTo(d, k));
  auto p = hn::Set(d, 0.00132647f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.00967151f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.05550734f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.24022242f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.69314698f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const auto scaled = hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(k)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), scaled);
}

// c[rows, cols] (+)= a[rows, depth] b[depth, cols], row-major with strides in elements.
struct MatMulArgs {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int rows, depth, cols;  // cols a multiple of 16
};

// The register tile: 24 accumulators of 32 registers, 12 of 16. Each step of depth takes kVectors
// loads of b and kRows broadcasts of a for their product of multiply-adds, so loads never limit.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = HWY_MAX_BYTES >= 64 ? 4 : 2;

// One register tile at (row, col). The loops are of constant length and unroll into registers.
template <bool kAccumulate, int kRows, int kVectors>
HWY_INLINE void MultiplyTile(const MatMulArgs& args, int64_t row, int64_t col) {
  const hn::CappedTag<float, 16> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sum[kRows][kVectors];
  float* c = args.c + row * args.c_stride + col;
  HWY_UNROLL(8)
  for (int i = 0; i < kRows; ++i) {
    HWY_UNROLL(8)
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = kAccumulate ? hn::LoadU(d, c + i * args.c_stride + j * lanes) : hn::Zero(d);
    }
  }
  const float* a = args.a + row * args.a_stride;
  const float* b = args.b + col;
  for (int k = 0; k < args.depth; ++k, ++a, b += args.b_stride) {
    hn::Vec<decltype(d)> bv[kVectors];
    HWY_UNROLL(8)
    for (int j = 0; j < kVectors; ++j) bv[j] = hn::LoadU(d, b + j * lanes);
    HWY_UNROLL(8)
    for (int i = 0; i < kRows; ++i) {
      const auto av = hn::Set(d, a[i * args.a_stride]);
      HWY_UNROLL(8)
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(av, bv[j], sum[i][j]);
    }
  }
  HWY_UNROLL(8)
  for (int i = 0; i < kRows; ++i) {
    HWY_UNROLL(8)
    for (int j = 0; j < kVectors; ++j) {
      hn::StoreU(sum[i][j], d, c + i * args.c_stride + j * lanes);
    }
  }
}

template <bool kAccumulate, int kVectors>
HWY_INLINE void MultiplyColumns(const MatMulArgs& args, int64_t col) {
  int row = 0;
  for (; row + kTileRows <= args.rows; row += kTileRows) {
    MultiplyTile<kAccumulate, kTileRows, kVectors>(args, row, col);
  }
  static_assert(kTileRows == 6);
  switch (args.rows - row) {
    case 5:
      return MultiplyTile<kAccumulate, 5, kVectors>(args, row, col);
    case 4:
      return MultiplyTile<kAccumulate, 4, kVectors>(args, row, col);
    case 3:
      return MultiplyTile<kAccumulate, 3, kVectors>(args, row, col);
    case 2:
      return MultiplyTile<kAccumulate, 2, kVectors>(args, row, col);
    case 1:
      return MultiplyTile<kAccumulate, 1, kVectors>(args, row, col);
  }
}

// Columns outside, rows inside: a panel of b stays in the first-level cache while the rows pass.
template <bool kAccumulate>
HWY_INLINE void MatMul(const MatMulArgs& args) {
  const int lanes = static_cast<int>(hn::Lanes(hn::CappedTag<float, 16>()));
  int col = 0;
  for (; col + kTileVectors * lanes <= args.cols; col += kTileVectors * lanes) {
    MultiplyColumns<kAccumulate, kTileVectors>(args, col);
  }
  for (; col < args.cols; col += lanes) MultiplyColumns<kAccumulate, 1>(args, col);
}

}  // namespace prefilld::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
