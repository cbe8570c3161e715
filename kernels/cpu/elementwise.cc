#include "kernels/cpu/elementwise.h"

#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::cpu::HWY_NAMESPACE {
using F32 = hn::ScalableTag<float>;
using F32x1 = hn::CappedTag<float, 1>;  // for what is left of a row

// step(d, i) for every i in [0, count): whole vectors, then single lanes.
template <class Step>
HWY_INLINE void ForEach(int64_t count, const Step& step) {
  const F32 df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) step(df, i);
  for (; i < count; ++i) step(F32x1(), i);
}

HWY_INLINE float SumOfSquares(const float* x, int64_t width) {
  const F32 df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  auto sum0 = hn::Zero(df);
  auto sum1 = hn::Zero(df);
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    const auto a = hn::LoadU(df, x + i);
    const auto b = hn::LoadU(df, x + i + lanes);
    sum0 = hn::MulAdd(a, a, sum0);
    sum1 = hn::MulAdd(b, b, sum1);
  }
  float sum = hn::GetLane(hn::SumOfLanes(df, hn::Add(sum0, sum1)));
  for (; i < width; ++i) sum += x[i] * x[i];
  return sum;
}

void NormalizeRow(const NormalizeRowArgs& args) {
  const float* x = args.x;
  const float* weight = args.weight;
  float* out = args.out;
  const float mean = SumOfSquares(x, args.width) / static_cast<float>(args.width);
  const float scale = 1.0f / std::sqrt(mean + args.eps);
  ForEach(args.width, [=](auto d, int64_t i) HWY_ATTR {
    const auto normed = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, scale));
    hn::StoreU(hn::Mul(normed, hn::LoadU(d, weight + i)), d, out + i);
  });
}

// Sine and cosine of angle[0, n); reads and writes whole vectors, up to kMaxRotaryDim / 2 values.
// An angle reaches the position itself (2^31), so it is reduced to [-pi/4, pi/4] in F64; there
// short polynomials are good to an ulp of F32.
HWY_INLINE void SinCos(const float* angle, int n, float* sine, float* cosine) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> df;
  const hn::Rebind<int32_t, decltype(dd)> di;
  for (int i = 0; i < n; i += static_cast<int>(hn::Lanes(dd))) {
    const auto a = hn::PromoteTo(dd, hn::LoadU(df, angle + i));
    const auto quarters = hn::Round(hn::Mul(a, hn::Set(dd, 0.63661977236758134308)));
    auto rest = hn::NegMulAdd(quarters, hn::Set(dd, 1.57079632679489655800), a);
    rest = hn::NegMulAdd(quarters, hn::Set(dd, 6.12323399573676603587e-17), rest);
    const auto x = hn::DemoteTo(df, rest);
    const auto z = hn::Mul(x, x);

    auto s = hn::MulAdd(z, hn::Set(df, -1.9515295891e-4f), hn::Set(df, 8.3321608736e-3f));
    s = hn::MulAdd(z, s, hn::Set(df, -1.6666654611e-1f));
    s = hn::MulAdd(hn::Mul(x, z), s, x);
    auto c = hn::MulAdd(z, hn::Set(df, 2.443315711809948e-5f), hn::Set(df, -1.388731625493765e-3f));
    c = hn::MulAdd(z, c, hn::Set(df, 4.166664568298827e-2f));
    c = hn::MulAdd(hn::Mul(z, z), c, hn::NegMulAdd(z, hn::Set(df, 0.5f), hn::Set(df, 1.0f)));

    // An odd quarter turn swaps the two; the second bit of the count is the sign.
    const auto q = hn::DemoteTo(di, quarters);
    const auto one = hn::Set(di, 1);
    const auto two = hn::Set(di, 2);
    const auto swap = hn::RebindMask(df, hn::Eq(hn::And(q, one), one));
    const auto sine_sign = hn::BitCast(df, hn::ShiftLeft<30>(hn::And(q, two)));
    const auto cosine_sign = hn::BitCast(df, hn::ShiftLeft<30>(hn::And(hn::Add(q, one), two)));
    hn::StoreU(hn::Xor(hn::IfThenElse(swap, c, s), sine_sign), df, sine + i);
    hn::StoreU(hn::Xor(hn::IfThenElse(swap, s, c), cosine_sign), df, cosine + i);
  }
}

// Pairs (i, i + half) of one head.
HWY_INLINE void RotateHalf(float* low, int half, const float* sine, const float* cosine) {
  float* high = low + half;
  ForEach(half, [=](auto d, int64_t i) HWY_ATTR {
    const auto a = hn::LoadU(d, low + i);
    const auto b = hn::LoadU(d, high + i);
    const auto vs = hn::LoadU(d, sine + i);
    const auto vc = hn::LoadU(d, cosine + i);
    hn::StoreU(hn::NegMulAdd(b, vs, hn::Mul(a, vc)), d, low + i);
    hn::StoreU(hn::MulAdd(a, vs, hn::Mul(b, vc)), d, high + i);
  });
}

// Pairs (2i, 2i + 1) of one head.
HWY_INLINE void RotateInterleaved(float* x, int half, const float* sine, const float* cosine) {
  ForEach(half, [=](auto d, int64_t i) HWY_ATTR {
    hn::Vec<decltype(d)> a, b;
    hn::LoadInterleaved2(d, x + 2 * i, a, b);
    const auto vs = hn::LoadU(d, sine + i);
    const auto vc = hn::LoadU(d, cosine + i);
    const auto turned = hn::NegMulAdd(b, vs, hn::Mul(a, vc));
    hn::StoreInterleaved2(turned, hn::MulAdd(a, vs, hn::Mul(b, vc)), d, x + 2 * i);
  });
}

void RotateToken(const RotateTokenArgs& args) {
  const int half = args.rotary_dim / 2;
  float angle[kMaxRotaryDim / 2] = {};
  float sine[kMaxRotaryDim / 2];
  float cosine[kMaxRotaryDim / 2];
  const float position = static_cast<float>(args.position);
  for (int i = 0; i < half; ++i) angle[i] = position * args.inverse_frequency[i];
  SinCos(angle, half, sine, cosine);
  for (int i = 0; i < half; ++i) {
    sine[i] *= args.scale;
    cosine[i] *= args.scale;
  }
  for (int h = 0; h < args.heads; ++h) {
    float* head = args.x + static_cast<int64_t>(h) * args.head_dim;
    if (args.pairing == RotaryPairing::kHalf) {
      RotateHalf(head, half, sine, cosine);
    } else {
      RotateInterleaved(head, half, sine, cosine);
    }
  }
}

void MultiplySilu(const float* gate, const float* up, int64_t count, float* out) {
  ForEach(count, [=](auto d, int64_t i) HWY_ATTR {
    const auto g = hn::LoadU(d, gate + i);
    // Exp ends at 88, where silu is 0 but for 1e-36.
    const auto e = Exp(d, hn::Min(hn::Set(d, 88.0f), hn::Neg(g)));
    const auto silu = hn::Div(g, hn::Add(hn::Set(d, 1.0f), e));
    hn::StoreU(hn::Mul(silu, hn::LoadU(d, up + i)), d, out + i);
  });
}

// Both narrowings work on the bits, so that every instruction set rounds alike. Value: the low 16
// bits.
template <class DI>
HWY_INLINE hn::Vec<DI> BF16Bits(DI di, hn::Vec<DI> bits) {
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7FFFFFFF));
  const auto is_nan = hn::Gt(magnitude, hn::Set(di, 0x7F800000));
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(di, 0x7FFF)));
  const auto quieted = hn::Or(bits, hn::Set(di, 0x00400000));
  return hn::And(hn::ShiftRight<16>(hn::IfThenElse(is_nan, quieted, rounded)), hn::Set(di, 0xFFFF));
}

template <class DI>
HWY_INLINE hn::Vec<DI> F16Bits(DI di, hn::Vec<DI> bits) {
  const hn::Rebind<float, DI> df;
  const auto magnitude = hn::And(bits, hn::Set(di, 0x7FFFFFFF));
  const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 0x8000));
  // Normal: rebias the exponent by 15 - 127 and round the 13 bits that go; a carry may reach
  // infinity.
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(di, 1));
  const auto rebias = hn::Set(di, -(112 << 23) + 0xFFF);
  const auto normal = hn::ShiftRight<13>(hn::Add(magnitude, hn::Add(odd, rebias)));
  // Below 2^-14: adding 0.5 makes the float adder itself round at 2^-24, the last bit of a
  // subnormal.
  const auto half = hn::Set(df, 0.5f);
  const auto subnormal =
      hn::Sub(hn::BitCast(di, hn::Add(hn::BitCast(df, magnitude), half)), hn::BitCast(di, half));
  const auto special = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7F800000)),
                                      hn::Set(di, 0x7E00), hn::Set(di, 0x7C00));
  auto result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 0x38800000)), subnormal, normal);
  result = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x477FFFFF)), special, result);
  return hn::Or(result, sign);
}

void Narrow(const float* src, int64_t count, DType dtype, void* dst) {
  uint16_t* out = static_cast<uint16_t*>(dst);
  switch (dtype) {
    case DType::kF32:
      std::memcpy(dst, src, count * sizeof(float));
      return;
    case DType::kBF16:
      return ForEach(count, [=](auto d, int64_t i) HWY_ATTR {
        const hn::RebindToSigned<decltype(d)> di;
        const hn::Rebind<uint16_t, decltype(d)> du16;
        const auto bits = hn::BitCast(di, hn::LoadU(d, src + i));
        hn::StoreU(hn::DemoteTo(du16, BF16Bits(di, bits)), du16, out + i);
      });
    case DType::kF16:
      return ForEach(count, [=](auto d, int64_t i) HWY_ATTR {
        const hn::RebindToSigned<decltype(d)> di;
        const hn::Rebind<uint16_t, decltype(d)> du16;
        const auto bits = hn::BitCast(di, hn::LoadU(d, src + i));
        hn::StoreU(hn::DemoteTo(du16, F16Bits(di, bits)), du16, out + i);
      });
  }
}

}  // namespace prefilld::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::cpu {

HWY_EXPORT(NormalizeRow);
void NormalizeRow(const NormalizeRowArgs& args) { HWY_DYNAMIC_DISPATCH(NormalizeRow)(args); }

HWY_EXPORT(RotateToken);
void RotateToken(const RotateTokenArgs& args) { HWY_DYNAMIC_DISPATCH(RotateToken)(args); }

HWY_EXPORT(MultiplySilu);
void MultiplySilu(const float* gate, const float* up, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(MultiplySilu)(gate, up, count, out);
}

HWY_EXPORT(Narrow);
void Narrow(const float* src, int64_t count, DType dtype, void* dst) {
  HWY_DYNAMIC_DISPATCH(Narrow)(src, count, dtype, dst);
}

}  // namespace prefilld::cpu
#endif  // HWY_ONCE
