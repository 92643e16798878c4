// Exponentials and the softcap of vectors. There are three exponentials, each as cheap as its use allows: 2^x for the
// statistics of a row, with log2(e) folded into the temperature; e^x, exactly 0 far down, for probabilities; e^x - 1
// for the KL.
#pragma once

#include "simd.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
// 2^x below this is taken as 2^-126, which vanishes beside the 1 of the largest element.
constexpr float kLeastExponent = -126.0f;

MGRPO_INLINE f32v clamp_exponent(f32v x) { return x < splat(kLeastExponent) ? splat(kLeastExponent) : x; }

// 2^x for x in [-126, 127]: split into an integer and a rest in [-1/2, 1/2], minimax polynomial, relative error 1e-7.
// NaN stays NaN only through `x` itself; callers that need it test their sum of e * x.
MGRPO_INLINE f32v exp2_in_range(f32v x) {
  const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x + magic;
  const f32v r = x - (shifted - magic);
  f32v p = splat(1.53533590e-4f);
  p = p * r + 1.33988750e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return as_float(as_int(p) + (as_int(shifted) << 23));
}

// The same for any x <= 127, at least 2^-126.
MGRPO_INLINE f32v exp2_le(f32v x) { return exp2_in_range(clamp_exponent(x)); }

// c tanh(z / c): by (1 - e) / (1 + e) with e = exp(-2 |z / c|), and by its series near 0 where that cancels.
MGRPO_INLINE f32v cap_logits(f32v z, float softcap) {
  const f32v u = z / softcap, a = abs(u);
  const f32v e = exp2_le(a * (-2.0f * kLog2e));
  const f32v far = (1.0f - e) / (1.0f + e);
  const f32v square = a * a;
  f32v series = square * 2.1869488e-2f - 5.3968254e-2f;
  series = series * square + 1.3333333e-1f;
  series = series * square - 3.3333333e-1f;
  const f32v near = a + a * square * series;
  const f32v magnitude = a < 0.25f ? near : far;
  const f32v capped = as_float(as_int(magnitude) | (as_int(u) & (int32_t)0x80000000)) * softcap;
  return u == u ? capped : u;
}

// e^x for x <= 88, exactly 0 below -87, to 7e-8: p = e^(z - lse) should lose no more than z itself does. By
// x = n ln 2 + r with ln 2 in two parts, then 1 + r + r^2 Q(r) with a minimax Q. A NaN gives any number.
MGRPO_INLINE f32v exp_or_zero(f32v x) {
  const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x * kLog2e + magic, n = shifted - magic;
  const f32v r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32v q = splat(1.38145406e-3f);
  q = q * r + 8.36874545e-3f;
  q = q * r + 4.16683890e-2f;
  q = q * r + 1.66665211e-1f;
  q = q * r + 4.99999940e-1f;
  const f32v p = q * (r * r) + r + 1.0f;
  return x < splat(-87.0f) ? splat(0.0f) : (f32v)((u32v)p + ((u32v)shifted << 23));
}

// c tanh(v / c) to 2e-7, for the error of a large logit is one of its probability: by e^-2|u|, and by a minimax
// polynomial where that cancels.
MGRPO_INLINE f32v softcapped(f32v v, float softcap) {
  const f32v u = v / softcap, a = abs(u), e = exp_or_zero(-2.0f * a), square = a * a;
  f32v q = splat(-5.70498593e-3f);
  q = q * square + 2.06390861e-2f;
  q = q * square - 5.37397154e-2f;
  q = q * square + 1.33314416e-1f;
  q = q * square - 3.33332807e-1f;
  const f32v size = a < 0.625f ? q * square * a + a : (1.0f - e) / (1.0f + e);
  const f32v capped = as_float(as_int(size) | (as_int(u) & INT32_MIN)) * softcap;
  return u == u ? capped : u;
}

MGRPO_INLINE f32v power_of_2(i32v exponent) { return as_float((i32v)((u32v)(exponent + 127) << 23)); }

struct Exponential {
  f32v exp;         // inf above 88.7, 0 below -104, NaN for NaN
  f32v expm1;       // relative error 2e-7
  f32v expm1_less;  // e^x - 1 - x; the same near 0
};

// x = n ln 2 + r: e^x - 1 = 2^n (r + r^2 Q(r)) + 2^n - 1, with Q the series of (e^r - 1 - r) / r^2 for |r| <= 0.35.
MGRPO_INLINE Exponential exponential(f32v x) {
  f32v y = x < splat(-104.0f) ? splat(-104.0f) : x;
  y = y > splat(89.0f) ? splat(89.0f) : y;
  const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = y * kLog2e + magic, n = shifted - magic;
  const f32v r = y - n * 0.693359375f + n * 2.12194440e-4f;
  f32v q = splat(2.48015873e-5f);
  q = q * r + 1.98412698e-4f;
  q = q * r + 1.38888889e-3f;
  q = q * r + 8.33333333e-3f;
  q = q * r + 4.16666667e-2f;
  q = q * r + 1.66666667e-1f;
  q = q * r + 0.5f;
  const f32v tail = r * r * q, p = r + tail;
  // Two factors reach both ends of the range: n is in [-150, 128].
  const i32v whole = as_int(shifted) - as_int(magic), half = whole >> 1;
  const f32v exp = (p + 1.0f) * power_of_2(half) * power_of_2(whole - half);
  const i32v moderate = abs(x) < splat(40.0f);
  const f32v scale = power_of_2(moderate ? whole : isplat(0));
  const f32v expm1 = select(moderate, scale * p + (scale - 1.0f), exp - 1.0f);
  return {exp, expm1, select(n == splat(0.0f), tail, expm1 - x)};
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
