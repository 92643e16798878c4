// One row of logits: statistics in one read, gradient in one read and one write. T is the element type.
//
// z' is the softcapped logit, z = z' / temperature. Statistics are taken about a running maximum of z', in blocks that
// stay in the first-level cache: a pass for the block's maximum, a pass that sums e^x and e^x x, x = z - max.
#pragma once

#include <cfloat>
#include <math.h>

#include "kernels.h"
#include "simd.h"
#include "vector_math.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // 4 KiB of fp32
constexpr int64_t kAhead = 512;

struct RowStats {
  float top;       // largest z'
  float exp;       // sum of e^x, >= 1; 0 where every logit is -inf, NaN where one is NaN
  float exp_x;     // sum of e^x x
  float finite_x;  // sum of x over the finite logits
  float num_finite;
};

struct RowGrad {
  float constant;  // dz = onehot (1(j = y) - p) + p (constant + slope a) - uniform, a = z - lse
  float slope;
  float onehot;
  float uniform;
  MGRPO_INLINE bool is_zero() const { return constant == 0 && slope == 0 && onehot == 0 && uniform == 0; }
};

template <typename T>
MGRPO_INLINE f32v load_logits(const T* p, float softcap) {
  const f32v z = load(p);
  return softcap > 0 ? cap_logits(z, softcap) : z;
}

template <typename T>
MGRPO_INLINE f32v load_logits_part(const T* p, int count, float softcap) {
  const f32v z = load_part(p, count, 0.0f);
  return softcap > 0 ? cap_logits(z, softcap) : z;
}

struct BlockSums {
  f32v exp = {}, exp_x = {}, finite_x = {}, num_finite = {};

  // Lanes from `count` on add nothing.
  template <bool kCertainty>
  MGRPO_INLINE void add(f32v z, float top, float scale, int count = kLanes) {
    const f32v gap = z - top;
    const f32v x = clamp_exponent(gap * scale);
    f32v e = exp2_in_range(x);
    if (count < kLanes) e = lane_index() < isplat(count) ? e : splat(0.0f);
    exp += e;
    exp_x += e * x;
    if (kCertainty) {
      const i32v finite = z != splat(-INFINITY);
      finite_x += select(finite, gap, splat(0.0f));
      num_finite += select(finite, splat(1.0f), splat(0.0f));
    }
  }
};

// The first `count` lanes of z; the others become -inf.
MGRPO_INLINE f32v only(f32v z, int count) {
  return lane_index() < isplat(count) ? z : splat(-INFINITY);
}

template <typename T, bool kCapped, bool kCertainty>
RowStats row_stats(const T* row, int64_t vocabulary, float temperature, float softcap) {
  softcap = kCapped ? softcap : 0.0f;
  const float scale = kLog2e / temperature;  // exponents are kept in powers of 2
  float top = -FLT_MAX;
  BlockSums total;
  float capped[kCapped ? kBlock + kLanes : 1];
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    const T* block = row + start;
    const int64_t size = vocabulary - start < kBlock ? vocabulary - start : kBlock;
    const int64_t whole = size / kLanes * kLanes;
    const int rest = static_cast<int>(size - whole);
    f32v highest[4] = {splat(-FLT_MAX), splat(-FLT_MAX), splat(-FLT_MAX), splat(-FLT_MAX)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k) {
        const f32v z = load_logits(block + i + k * kLanes, softcap);
        if (kCapped) store(capped + i + k * kLanes, z);
        highest[k] = max(highest[k], z);
      }
    for (; i < whole; i += kLanes) {
      const f32v z = load_logits(block + i, softcap);
      if (kCapped) store(capped + i, z);
      highest[0] = max(highest[0], z);
    }
    f32v tail = splat(-INFINITY);
    if (rest) {
      tail = only(load_logits_part(block + whole, rest, softcap), rest);
      highest[1] = max(highest[1], tail);
    }
    const float here = reduce_max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
    if (here > top) {
      const f32v gap = clamp_exponent(splat((top - here) * scale)), weight = exp2_in_range(gap);
      total.exp_x = weight * (total.exp_x + total.exp * gap);
      total.exp = weight * total.exp;
      if (kCertainty) total.finite_x += total.num_finite * (top - here);
      top = here;
    }
    BlockSums sums[4];
    for (i = 0; i + 4 * kLanes <= whole; i += 4 * kLanes) {
      // Prefetch the next block while this one is summed.
      for (size_t line = 0; line < 4 * kLanes * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(block + kBlock + i) + line);
      for (int k = 0; k < 4; ++k)
        sums[k].template add<kCertainty>(
            kCapped ? load(capped + i + k * kLanes) : load(block + i + k * kLanes), top, scale);
    }
    for (; i < whole; i += kLanes)
      sums[0].template add<kCertainty>(kCapped ? load(capped + i) : load(block + i), top, scale);
    if (rest) sums[1].template add<kCertainty>(tail, top, scale, rest);
    total.exp += (sums[0].exp + sums[1].exp) + (sums[2].exp + sums[3].exp);
    total.exp_x += (sums[0].exp_x + sums[1].exp_x) + (sums[2].exp_x + sums[3].exp_x);
    if (kCertainty) {
      total.finite_x += (sums[0].finite_x + sums[1].finite_x) + (sums[2].finite_x + sums[3].finite_x);
      total.num_finite += (sums[0].num_finite + sums[1].num_finite) + (sums[2].num_finite + sums[3].num_finite);
    }
  }
  RowStats out;
  out.top = top;
  out.exp = reduce_add(total.exp);
  out.exp_x = reduce_add(total.exp_x) * kLn2;
  out.finite_x = reduce_add(total.finite_x) / temperature;
  out.num_finite = reduce_add(total.num_finite);
  // The largest element adds 1: less means that every logit is -inf.
  if (out.exp < 0.5f) out.exp = out.exp_x = 0.0f;
  if (out.exp_x != out.exp_x) out.exp = out.exp_x;
  return out;
}

template <typename T>
MGRPO_INLINE float logit_at(const T* row, int64_t column, float softcap) {
  return load_logits_part(row + column, 1, softcap)[0];
}

// A logit z' and its log-probability, about which those of the others are found: the target's, or 0 and minus
// log-sum-exp, whichever log-probability is smaller and so rounded less.
struct Anchor {
  float z;
  float logprob;
};

// The same for a whole row, with exponents in powers of 2 and the outer 1 / temperature taken in.
template <bool kUniform>
struct RowGradient {
  float scale, anchor_z, anchor_exponent, constant, slope, uniform, softcap;

  RowGradient(const RowGrad& g, const Anchor& anchor, float inverse_temperature, float cap)
      : scale(inverse_temperature * kLog2e),
        anchor_z(anchor.z),
        anchor_exponent(anchor.logprob * kLog2e),
        constant((g.constant - g.onehot) * inverse_temperature),
        slope(g.slope * kLn2 * inverse_temperature),
        uniform(g.uniform * inverse_temperature),
        softcap(cap) {}

  // Without the one-hot term of the target.
  MGRPO_INLINE f32v operator()(f32v z) const {
    const f32v exponent = (z - anchor_z) * scale + anchor_exponent;
    const i32v vanishes = exponent < splat(kLeastExponent);
    const f32v x = vanishes ? splat(kLeastExponent) : exponent;
    const f32v e = exp2_in_range(x);
    const f32v p = vanishes ? splat(0.0f) : e;
    f32v dz = p * (x * slope + constant);
    if (kUniform) dz -= z == splat(-INFINITY) ? splat(0.0f) : splat(uniform);
    if (softcap > 0) {
      const f32v tanh = z / softcap;
      dz *= 1.0f - tanh * tanh;
    }
    return dz;
  }
};

// Writes the whole gradient row; `out` may be `row`. `column` is the target, inside [0, V), `logprob` its own.
template <typename T, bool kCapped, bool kUniform>
void row_gradient_as(const T* row, T* out, int64_t vocabulary, int64_t column, float temperature, float softcap,
                     float lse, float logprob, const RowGrad& g) {
  softcap = kCapped ? softcap : 0.0f;
  const float inverse = 1.0f / temperature;
  const float z_target = logit_at(row, column, softcap);
  const bool is_finite = logprob > -INFINITY;
  const Anchor anchor = -logprob < fabsf(lse) ? Anchor{z_target, logprob} : Anchor{0.0f, -lse};
  const RowGradient<kUniform> gradient(g, anchor, inverse, softcap);
  const int64_t whole = vocabulary / kLanes * kLanes;
  int64_t i = 0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
    __builtin_prefetch(row + i + kAhead);
    f32v dz[4];
    for (int k = 0; k < 4; ++k) dz[k] = gradient(load_logits(row + i + k * kLanes, softcap));
    for (int k = 0; k < 4; ++k) store(out + i + k * kLanes, dz[k]);
  }
  for (; i < whole; i += kLanes) store(out + i, gradient(load_logits(row + i, softcap)));
  const int rest = static_cast<int>(vocabulary - whole);
  if (rest) store_part(out + whole, gradient(load_logits_part(row + whole, rest, softcap)), rest);
  // The target again, with 1 - p free of the rounding of p.
  RowGrad own = g;
  own.onehot = 0;
  const float target = RowGradient<true>(own, anchor, inverse, softcap)(splat(z_target))[0];
  const float tanh = kCapped ? z_target / softcap : 0.0f;
  const float complement = is_finite ? -expm1f(logprob) : 1.0f;
  out[column] = from_float<T>(target + g.onehot * complement * inverse * (1.0f - tanh * tanh));
}

template <typename T, bool kCapped>
void row_gradient(const T* row, T* out, int64_t vocabulary, int64_t column, float temperature, float softcap,
                  float lse, float logprob, const RowGrad& g) {
  if (lse != lse) {
    for (int64_t i = 0; i < vocabulary; ++i) out[i] = from_float<T>(NAN);
  } else if (g.uniform != 0) {
    row_gradient_as<T, kCapped, true>(row, out, vocabulary, column, temperature, softcap, lse, logprob, g);
  } else {
    row_gradient_as<T, kCapped, false>(row, out, vocabulary, column, temperature, softcap, lse, logprob, g);
  }
}

template <typename T>
MGRPO_INLINE void zero_row(T* out, int64_t vocabulary) {
  std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(vocabulary));
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
