// Exponential moving average of a list of tensors, in place.
//
// Fused: both casts, the blend, the rounding (to nearest, stochastic or compensated) and the copy for the rollout
// engine, in one read of momentum and policy and one write of momentum (and of the copy); a cast and
// torch._foreach_lerp_ move 8 more bytes an element from bf16 to fp32. Every element is computed alone, random bits
// included, so nothing depends on how threads share the list.
#include "ema_update.h"

#include <math.h>

#include "simd.h"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

// 64 Ki elements a span of work: some 10 us, long enough to hide the search for its first tensor.
constexpr int64_t kSpanGroups = 1024;
// How far ahead memory is asked for: the best of 512 to 4096, three times faster than none for bf16 weights.
constexpr int kPrefetchBytes = 2048;
constexpr int kPair = 2 * kLanes;
static_assert(kEmaGroup % kPair == 0, "a group must hold whole pairs of vectors");

typedef uint64_t u64v __attribute__((vector_size(4 * kLanes)));

enum class Rounding { nearest, stochastic, compensated };

struct Blend {
  bool keeps;     // weight 0: the momentum stays, whatever the policy holds
  bool copies;    // weight 1: it becomes the policy, whatever it held
  bool from_old;  // whether the mix starts from the momentum or from the policy, as in torch.lerp
  float coefficient;
};

double weight_of(const EmaUpdate& args) {
  if (!args.decay) return args.weight;
  return *args.decay >= 0 && *args.decay <= 1 ? 1 - *args.decay : static_cast<double>(NAN);
}

uint32_t step_of(const EmaUpdate& args) { return args.step_at ? static_cast<uint32_t>(*args.step_at) : args.step; }

Blend blend_of(double weight) {
  const float share = static_cast<float>(weight);
  const bool from_old = share < 0.5f;
  return {weight == 0, weight == 1, from_old, from_old ? share : share - 1.0f};
}

// a b + c, rounded once where the processor can: torch.lerp is written so.
MGRPO_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Products of the low halves of each 64-bit lane.
MGRPO_INLINE u64v multiply_low(u64v a, uint32_t b) {
#if defined(__AVX512F__)
  return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (u64v)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * (u64v{} + b);
#endif
}

// Random bits of one tensor by Philox 4x32-10 (Salmon et al. 2011). A lane holds one counter: its words lie in the low
// halves, what is above them is never read.
struct Random {
  u64v lanes;            // 0, 1, 2, ...
  u64v keys[10][2];      // of every round
  uint32_t tensor_index;
  uint32_t step;

  Random(uint64_t seed, uint32_t step, uint32_t tensor_index) : tensor_index(tensor_index), step(step) {
    for (int lane = 0; lane < kLanes / 2; ++lane) lanes[lane] = lane;
    for (uint32_t round = 0; round < 10; ++round) {
      keys[round][0] = u64v{} + (static_cast<uint32_t>(seed) + round * 0x9e3779b9u);
      keys[round][1] = u64v{} + (static_cast<uint32_t>(seed >> 32) + round * 0xbb67ae85u);
    }
  }

  // Low 16 bits of the words of kPair elements from `element`, a multiple of 4, on, in their order.
  MGRPO_INLINE void draw(uint64_t element, u16v (&bits)[2]) const {
    const u64v quad = lanes + element / 4;
    u64v c0 = quad, c1 = quad >> 32, c2 = u64v{} + step, c3 = u64v{} + tensor_index;
    for (int round = 0; round < 10; ++round) {
      const u64v left = multiply_low(c0, 0xd2511f53u), right = multiply_low(c2, 0xcd9e8d57u);
      c0 = (right >> 32) ^ c1 ^ keys[round][0];
      c1 = right;
      c2 = (left >> 32) ^ c3 ^ keys[round][1];
      c3 = left;
    }
    const u64v words = (c0 & 0xffffu) | (c1 & 0xffffu) << 16 | (c2 & 0xffffu) << 32 | c3 << 48;
    std::memcpy(bits, &words, sizeof words);
  }
};

template <bool kWhole, typename T>
MGRPO_INLINE f32v get(const T* from, int count) {
  return kWhole ? load(from) : load_part(from, count, 0.0f);
}

// bf16, up with the probability of the dropped fraction. A NaN must be a quiet one, which cutting leaves a NaN.
MGRPO_INLINE u16v round_stochastically(f32v value, u16v random) {
  const u32v bits = (u32v)value;
  const i32v is_finite = (i32v)(bits & 0x7f800000u) != 0x7f800000;
  return narrow((is_finite ? bits + widen(random) : bits) >> 16);
}

MGRPO_INLINE f32v quiet(f32v value) { return value == value ? value : (f32v)((u32v)value | 0x400000u); }

// Store a value and return what is kept of it.
template <Rounding kRounding, bool kWhole>
MGRPO_INLINE f32v keep(float* to, f32v value, int count, u16v) {
  std::memcpy(to, &value, sizeof(float) * (kWhole ? kLanes : count));
  return value;
}

template <Rounding kRounding, bool kWhole>
MGRPO_INLINE f32v keep(f16* to, f32v value, int count, u16v) {
  f16 kept[kLanes];
  store(kept, value);
  std::memcpy(to, kept, sizeof(f16) * (kWhole ? kLanes : count));
  return load(kept);
}

template <Rounding kRounding, bool kWhole>
MGRPO_INLINE f32v keep(bf16* to, f32v value, int count, u16v random) {
  const u16v half = kRounding == Rounding::stochastic ? round_stochastically(value, random) : to_bf16_bits(value);
  std::memcpy(to, &half, sizeof(bf16) * (kWhole ? kLanes : count));
  return (f32v)(widen(half) << 16);
}

template <bool kWhole>
MGRPO_INLINE void publish(const EmaTensor& tensor, int64_t i, f32v value, int count) {
  constexpr Rounding nearest = Rounding::nearest;
  switch (tensor.publish_dtype) {
    case Dtype::f32: keep<nearest, kWhole>(static_cast<float*>(tensor.publish) + i, value, count, u16v{}); break;
    case Dtype::bf16: keep<nearest, kWhole>(static_cast<bf16*>(tensor.publish) + i, value, count, u16v{}); break;
    case Dtype::f16: keep<nearest, kWhole>(static_cast<f16*>(tensor.publish) + i, value, count, u16v{}); break;
  }
}

// One vector of the elements from i on, `count` of them unless whole.
template <typename T, typename U, Rounding kRounding, bool kWhole>
MGRPO_INLINE void update_vector(const EmaTensor& tensor, const Blend& blend, int64_t i, int count, u16v random) {
  T* momentum = static_cast<T*>(tensor.momentum) + i;
  f32v old = get<kWhole>(momentum, count);
  if (!blend.keeps) {
    bf16* term = kRounding == Rounding::compensated ? static_cast<bf16*>(tensor.compensation) + i : nullptr;
    if (kRounding == Rounding::compensated) old += get<kWhole>(term, count);
    const f32v latest = get<kWhole>(static_cast<const U*>(tensor.policy) + i, count);
    f32v mixed = multiply_add(splat(blend.coefficient), latest - old, blend.from_old ? old : latest);
    if (blend.copies) mixed = quiet(latest);
    old = keep<kRounding, kWhole>(momentum, mixed, count, random);
    if (kRounding == Rounding::compensated) keep<Rounding::nearest, kWhole>(term, mixed - old, count, u16v{});
  }
  if (tensor.publish) publish<kWhole>(tensor, i, old, count);
}

// The work on a line fills the window in which the processor would find the next misses by itself.
template <typename T>
MGRPO_INLINE void prefetch(const T* now) {
  const char* ahead = reinterpret_cast<const char*>(now) + kPrefetchBytes;
  __builtin_prefetch(ahead, 0, 3);
  if (kPair * sizeof(T) > 64) __builtin_prefetch(ahead + 64, 0, 3);
}

template <typename T, typename U, Rounding kRounding>
void update_span(const EmaUpdate& args, const Blend& shared, int64_t index, int64_t begin, int64_t end) {
  // Copies, for the stores below might alias what is behind a reference.
  const EmaTensor tensor = args.tensors[index];
  const Blend blend = shared;
  const Random random(args.seed, step_of(args), static_cast<uint32_t>(index));
  u16v bits[2] = {};
  int64_t i = begin;
  // A shard may begin inside a counter's four words: after their last ones, all vectors begin with a first word.
  const int num_passed = kRounding == Rounding::stochastic ? (tensor.offset + i) % 4 : 0;
  if (num_passed) {
    const int count = static_cast<int>(end - i < 4 - num_passed ? end - i : 4 - num_passed);
    random.draw(tensor.offset + i - num_passed, bits);
    u16v words;
    std::memcpy(&words, reinterpret_cast<const uint16_t*>(bits) + num_passed, sizeof words);
    update_vector<T, U, kRounding, false>(tensor, blend, i, count, words);
    i += count;
  }
  for (; i + kPair <= end; i += kPair) {
    prefetch(static_cast<const T*>(tensor.momentum) + i);
    prefetch(static_cast<const U*>(tensor.policy) + i);
    if (kRounding == Rounding::compensated) prefetch(static_cast<const bf16*>(tensor.compensation) + i);
    if (kRounding == Rounding::stochastic) random.draw(tensor.offset + i, bits);
    update_vector<T, U, kRounding, true>(tensor, blend, i, kLanes, bits[0]);
    update_vector<T, U, kRounding, true>(tensor, blend, i + kLanes, kLanes, bits[1]);
  }
  if (i == end) return;
  if (kRounding == Rounding::stochastic) random.draw(tensor.offset + i, bits);
  for (int part = 0; i < end; ++part, i += kLanes) {
    const int count = static_cast<int>(end - i < kLanes ? end - i : kLanes);
    update_vector<T, U, kRounding, false>(tensor, blend, i, count, bits[part]);
  }
}

using UpdateSpan = void (*)(const EmaUpdate&, const Blend&, int64_t, int64_t, int64_t);

template <typename T, Rounding kRounding>
UpdateSpan span_of(Dtype policy) {
  switch (policy) {
    case Dtype::f32: return update_span<T, float, kRounding>;
    case Dtype::bf16: return update_span<T, bf16, kRounding>;
    case Dtype::f16: break;
  }
  return update_span<T, f16, kRounding>;
}

UpdateSpan span_of(const EmaTensor& tensor, bool stochastic) {
  switch (tensor.momentum_dtype) {
    case Dtype::f32: return span_of<float, Rounding::nearest>(tensor.policy_dtype);
    case Dtype::f16: return span_of<f16, Rounding::nearest>(tensor.policy_dtype);
    case Dtype::bf16: break;
  }
  if (tensor.compensation) return span_of<bf16, Rounding::compensated>(tensor.policy_dtype);
  if (stochastic) return span_of<bf16, Rounding::stochastic>(tensor.policy_dtype);
  return span_of<bf16, Rounding::nearest>(tensor.policy_dtype);
}

// The last tensor that starts at or before a group.
int64_t tensor_at(const EmaUpdate& args, int64_t group) {
  int64_t low = 0, high = args.num_tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.tensors[middle].first_group <= group ? low : high) = middle;
  }
  return low;
}

}  // namespace

void ema_update(const EmaUpdate& args) {
  const Blend blend = blend_of(weight_of(args));
  const int64_t num_spans = (args.num_groups + kSpanGroups - 1) / kSpanGroups;
  const int num_threads = static_cast<int>(num_spans < args.executor ? num_spans : args.executor);
  if (num_spans == 0) return;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t span = 0; span < num_spans; ++span) {
    const int64_t first = span * kSpanGroups, last = first + kSpanGroups;
    for (int64_t index = tensor_at(args, first); index < args.num_tensors; ++index) {
      const EmaTensor& tensor = args.tensors[index];
      if (tensor.first_group >= last) break;
      const int64_t begin = first > tensor.first_group ? (first - tensor.first_group) * kEmaGroup : 0;
      const int64_t limit = (last - tensor.first_group) * kEmaGroup;
      const int64_t end = tensor.count < limit ? tensor.count : limit;
      if (begin < end) span_of(tensor, args.stochastic)(args, blend, index, begin, end);
    }
  }
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
