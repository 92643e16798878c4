// Vectors of the register's width on the compilers' vector extension: one source for AVX-512, AVX2 and any other target.
//
// Every file that includes this is compiled once per instruction set (see CMakeLists.txt) with MGRPO_ISA naming the
// namespace. Nothing here, and nothing in such a file, may instantiate a template of the standard library that the
// linker could merge with the same template of another build: an old CPU would then run AVX-512 code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef MGRPO_ISA
#define MGRPO_ISA portable
#endif

#define MGRPO_INLINE inline __attribute__((always_inline))

namespace mgrpo {

namespace MGRPO_ISA {
namespace {

// Wider vectors than a register are taken apart lane by lane by some compilers, so the width follows the target.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

MGRPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MGRPO_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
MGRPO_INLINE int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

MGRPO_INLINE f32v splat(float value) { return f32v{} + value; }
MGRPO_INLINE i32v isplat(int32_t value) { return i32v{} + value; }
MGRPO_INLINE f32v as_float(i32v bits) { return (f32v)bits; }
MGRPO_INLINE i32v as_int(f32v value) { return (i32v)value; }
// 0, 1, 2, ...
MGRPO_INLINE i32v lane_index() {
  constexpr int32_t index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  i32v lanes;
  std::memcpy(&lanes, index, sizeof lanes);
  return lanes;
}

MGRPO_INLINE f32v select(i32v condition, f32v yes, f32v no) { return condition ? yes : no; }

// A NaN in `a` is lost, one in `b` is kept: pass the accumulator first.
MGRPO_INLINE f32v max(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

MGRPO_INLINE f32v min(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

MGRPO_INLINE f32v abs(f32v v) { return as_float(as_int(v) & 0x7fffffff); }

// Horizontal sum and maximum, pairwise in one fixed order.
MGRPO_INLINE float reduce_add(f32v v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

MGRPO_INLINE float reduce_max(f32v v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// Half words to words and back (the low halves): the compilers' own conversion goes through pieces of the register.
MGRPO_INLINE u32v widen(u16v v) {
#if defined(__AVX512F__)
  return (u32v)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (u32v)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, u32v);
#endif
}

MGRPO_INLINE u16v narrow(u32v v) {
#if defined(__AVX512F__)
  return (u16v)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, u16v);
#endif
}

MGRPO_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MGRPO_INLINE f32v load(const bf16* p) {
  u16v half;
  std::memcpy(&half, p, sizeof half);
  return (f32v)(widen(half) << 16);
}

MGRPO_INLINE f32v load(const f16* p) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, p, sizeof half);
  return (f32v)_mm512_cvtph_ps(half);
#elif defined(__AVX2__)
  __m128i half;
  std::memcpy(&half, p, sizeof half);
  return (f32v)_mm256_cvtph_ps(half);
#else
  u16v half;
  std::memcpy(&half, p, sizeof half);
  const u32v wide = __builtin_convertvector(half, u32v);
  // The exponent moves by a product, which also normalises denormals; infinity and NaN keep a full exponent.
  const f32v scaled = (f32v)((wide & 0x7fff) << 13) * 5.192296858534828e33f;
  const u32v special = (u32v)((wide & 0x7c00) == 0x7c00) & 0x7f800000u;
  return (f32v)((u32v)scaled | special | ((wide & 0x8000) << 16));
#endif
}

MGRPO_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even; NaN stays NaN.
MGRPO_INLINE u16v to_bf16_bits(f32v v) {
  const u32v bits = (u32v)v;
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;
  return narrow(v == v ? rounded : quiet);
}

MGRPO_INLINE void store(bf16* p, f32v v) {
  const u16v half = to_bf16_bits(v);
  std::memcpy(p, &half, sizeof half);
}

MGRPO_INLINE void store(f16* p, f32v v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof half);
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof half);
#else
  const u32v bits = (u32v)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal: drop 13 bits, to nearest even, and move the exponent from 127 to 15. Below 2^-14: let an addition round.
  const u32v normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32v small = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
  u32v half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? u32v{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? u32v{} + 0x7e00u : half;
  const u16v out = __builtin_convertvector(half | sign, u16v);
  std::memcpy(p, &out, sizeof out);
#endif
}

// The first `count` < kLanes elements; the other lanes hold `fill`.
template <typename T>
MGRPO_INLINE f32v load_part(const T* p, int count, float fill) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(T) * count);
  return lane_index() < isplat(count) ? load(lanes) : splat(fill);
}

template <typename T>
MGRPO_INLINE void store_part(T* p, f32v v, int count) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(T) * count);
}

MGRPO_INLINE float to_float(float v) { return v; }
MGRPO_INLINE float to_float(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
MGRPO_INLINE float to_float(f16 v) { return load_part(&v, 1, 0.0f)[0]; }

template <typename T>
MGRPO_INLINE T from_float(float v) {
  T out;
  store_part(&out, splat(v), 1);
  return out;
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
