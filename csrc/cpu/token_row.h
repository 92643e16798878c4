// One row of logits: statistics in one read, gradient in one read and one write. T is the element type.
//
// z' is the softcapped logit, z = z' / temperature. Statistics are taken about a running maximum of z', in blocks that
// stay in the first-level cache: a pass for the block's maximum, a pass that sums e^x and e^x x, x = z - max.
#pragma once

#include <cfloat>
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // 4 KiB of fp32

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
    for (i = 0; i + 4 * kLanes <= whole; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k)
        sums[k].template add<kCertainty>(
            kCapped ? load(capped + i + k * kLanes) : load(block + i + k * kLanes), top, scale);
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

// A logit z' and its log-probability, about which those of the others are found: their differences do not round as
// log-sum-exp does where logits are large.
struct Anchor {
  float z;
  float logprob;
};

MGRPO_INLINE f32v gradient_of(f32v z, float inverse_temperature, const Anchor& anchor, float softcap,
                              const RowGrad& g) {
  const f32v scaled = (z - anchor.z) * inverse_temperature + anchor.logprob;
  const f32v floor = splat(kLeastExponent * kLn2);
  const f32v a = scaled < floor ? floor : scaled;
  const f32v e = exp2_in_range(a * kLog2e);
  const f32v p = scaled < floor ? splat(0.0f) : e;
  f32v dz = p * (a * g.slope + g.constant);
  dz -= z == splat(-INFINITY) ? splat(0.0f) : splat(g.uniform);
  dz *= inverse_temperature;
  if (softcap > 0) {
    const f32v tanh = z / softcap;
    dz *= 1.0f - tanh * tanh;
  }
  return dz;
}

// Writes the whole gradient row; `out` may be `row`. `column` is the target, inside [0, V), `logprob` its own.
template <typename T, bool kCapped>
void row_gradient(const T* row, T* out, int64_t vocabulary, int64_t column, float temperature, float softcap,
                  float lse, float logprob, const RowGrad& g) {
  if (lse != lse) {
    for (int64_t i = 0; i < vocabulary; ++i) out[i] = from_float<T>(NAN);
    return;
  }
  softcap = kCapped ? softcap : 0.0f;
  const float inverse = 1.0f / temperature;
  const float z_target = logit_at(row, column, softcap);
  const Anchor anchor = logprob > -INFINITY ? Anchor{z_target, logprob} : Anchor{0.0f, -lse};
  RowGrad others = g;
  others.constant -= g.onehot;
  const int64_t whole = vocabulary / kLanes * kLanes;
  int64_t i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    const f32v left = load_logits(row + i, softcap), right = load_logits(row + i + kLanes, softcap);
    store(out + i, gradient_of(left, inverse, anchor, softcap, others));
    store(out + i + kLanes, gradient_of(right, inverse, anchor, softcap, others));
  }
  for (; i < whole; i += kLanes) store(out + i, gradient_of(load_logits(row + i, softcap), inverse, anchor, softcap, others));
  const int rest = static_cast<int>(vocabulary - whole);
  if (rest)
    store_part(out + whole, gradient_of(load_logits_part(row + whole, rest, softcap), inverse, anchor, softcap, others), rest);
  const float tanh = kCapped ? z_target / softcap : 0.0f;
  const float target = gradient_of(splat(z_target), inverse, anchor, softcap, g)[0];
  // 1 - p of the target without the rounding of p.
  const float complement = logprob > -INFINITY ? -expm1f(logprob) : 1.0f;
  out[column] = from_float<T>(target + g.onehot * complement * inverse * (1.0f - tanh * tanh));
}

template <typename T>
MGRPO_INLINE void zero_row(T* out, int64_t vocabulary) {
  std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(vocabulary));
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
