// The vector loops behind tile.h, for kernels that inline them: loads that widen, exponentials, and
// the one register-blocked matrix product. Included once per instruction set (Highway).
#include <cstdint>
#include <limits>

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
template <class D>
HWY_INLINE hn::Vec<D> LoadWide(D d, const hwy::bfloat16_t* from) {
  const hn::Rebind<uint16_t, D> bits;
  const hn::RebindToUnsigned<D> wide;
  const auto loaded = hn::LoadU(bits, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, loaded)));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadWide(D d, const hwy::float16_t* from) {
  const hn::Rebind<uint16_t, D> bits;
  const hn::Rebind<hwy::float16_t, D> half;
  const auto loaded = hn::LoadU(bits, reinterpret_cast<const uint16_t*>(from));
  const auto wide = hn::PromoteTo(d, hn::BitCast(half, loaded));
  // Instruction sets without a conversion take infinity and NaN for 65536 and more, which no F16
  // is.
  const auto special = hn::Or(wide, hn::Set(d, std::numeric_limits<float>::infinity()));
  return hn::IfThenElse(hn::Ge(hn::Abs(wide), hn::Set(d, 65536.0f)), special, wide);
}

// x to the nearest integer k, as k and as 2^k, for -126 <= x <= 127. Adding 1.5 * 2^23 leaves no
// bits below 1, and the low bits of the sum are k: plus the exponent's bias they shift into its
// place.
template <class D>
struct PowerOfTwo {
  hn::Vec<D> k, power;

  HWY_INLINE PowerOfTwo(D d, hn::Vec<D> x) {
    const hn::RebindToUnsigned<D> du;
    const auto shift = hn::Set(d, 12582912.0f + 127.0f);
    const auto shifted = hn::Add(x, shift);
    k = hn::Sub(shifted, shift);
    power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, shifted)));
  }
};

// exp(x) within 2e-7 of itself and exactly 1 at 0; 0 below -87, NaN at NaN. For x <= 88.
// x = k ln 2 + r; e^r = 1 + r + r^2 P(r), P fitted for the least relative error (3e-9).
template <class D>
HWY_INLINE hn::Vec<D> Exp(D d, hn::Vec<D> x) {
  const PowerOfTwo<D> two(d, hn::Mul(x, hn::Set(d, 1.44269504f)));
  auto r = hn::NegMulAdd(two.k, hn::Set(d, 0.693359375f), x);  // ln 2 in two parts: the product
  r = hn::NegMulAdd(two.k, hn::Set(d, -2.12194440e-4f), r);    // with the first is exact
  auto p = hn::Set(d, 0.00138146f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.00836872f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.04166839f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.16666521f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.49999993f));
  p = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), hn::Set(d, 1.0f));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), hn::Mul(p, two.power));
}

// 2^x within 2e-7 of itself and exactly 1 at 0; 0 below -126, NaN at NaN. For x <= 0.
template <class D>
HWY_INLINE hn::Vec<D> Exp2(D d, hn::Vec<D> x) {
  const PowerOfTwo<D> two(d, x);
  const auto r = hn::Sub(x, two.k);
  auto p = hn::Set(d, 0.00132647f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.00967151f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.05550734f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.24022242f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.69314698f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, two.power));
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
  if constexpr (kTileVectors > 2) {
    for (; col + 2 * lanes <= args.cols; col += 2 * lanes) {
      MultiplyColumns<kAccumulate, 2>(args, col);
    }
  }
  for (; col < args.cols; col += lanes) MultiplyColumns<kAccumulate, 1>(args, col);
}

}  // namespace prefilld::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
