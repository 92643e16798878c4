// What kernels use of a GPU. One source for nvcc and, with MGRPO_EMULATE, for a CPU (see emulate.h).
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dtype.h"

#if defined(MGRPO_EMULATE)
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace mgrpo {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

#if defined(MGRPO_EMULATE)

// A launch; blocks [grid] of `size` threads, at least one.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int size, Executor, const Args&... args) {
  if (grid > 0) emulated::launch(grid, size, [&] { kernel(args...); });
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return emulated::shuffle_xor(value, mask);
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float float_of(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
// Keeps a NaN of either side.
inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float multiply(float a, float b) { return a * b; }
inline uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>(value == value ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : bits >> 16 | 0x40u);
}
inline float from_f16(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, magnitude = half & 0x7fffu;
  const float scaled = float_of(magnitude << 13) * 5.192296858534828e33f;  // 2^112 also normalises denormals
  return float_of((magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : bits_of(scaled)) | sign);
}
inline uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u)  // below 2^-14: let an addition round
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13);
}

#else

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("mgrpo_kernels: ") + cudaGetErrorString(status));
}

// A launch; blocks [grid] of `size` threads, at least one.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int size, Executor executor, const Args&... args) {
  if (grid <= 0) return;
  kernel<<<static_cast<unsigned>(grid), size, 0, reinterpret_cast<cudaStream_t>(executor)>>>(args...);
  check(cudaGetLastError());
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ __forceinline__ float exp2_approx(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
// Keeps a NaN of either side.
__device__ __forceinline__ float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
// A product that is rounded, never fused with the sum that takes it.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }

__device__ __forceinline__ uint16_t to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
__device__ __forceinline__ float from_f16(uint16_t half) { return __half2float(__ushort_as_half(half)); }
__device__ __forceinline__ uint16_t to_f16(float value) { return __half_as_ushort(__float2half_rn(value)); }

#endif

__device__ __forceinline__ float from_bf16(uint16_t half) { return float_of(uint32_t{half} << 16); }

// Element types: what they are stored as, and what their bits mean.
struct F32 {
  using Bits = uint32_t;
  static __device__ __forceinline__ float from(Bits bits) { return float_of(bits); }
  static __device__ __forceinline__ Bits to(float value) { return bits_of(value); }
};
struct Bf16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float from(Bits bits) { return from_bf16(bits); }
  static __device__ __forceinline__ Bits to(float value) { return to_bf16(value); }
};
struct F16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float from(Bits bits) { return from_f16(bits); }
  static __device__ __forceinline__ Bits to(float value) { return to_f16(value); }
};

// 16 bytes, what one load instruction brings.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(typename T::Bits);
  typename T::Bits bits[kSize];
};

// Memory that is read or written once: past the first-level cache.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const typename T::Bits* from) {
  Vector<T> out;
#if defined(MGRPO_EMULATE)
  std::memcpy(&out, from, sizeof out);
#else
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
  memcpy(&out, &words, sizeof out);
#endif
  return out;
}

template <typename T>
__device__ __forceinline__ void store_vector(typename T::Bits* to, const Vector<T>& vector) {
#if defined(MGRPO_EMULATE)
  std::memcpy(to, &vector, sizeof vector);
#else
  uint4 words;
  memcpy(&words, &vector, sizeof vector);
  __stcs(reinterpret_cast<uint4*>(to), words);
#endif
}

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Sum over a warp; every lane gets it, in one fixed order.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Sum over a block of kThreads, in one fixed order; every thread gets it.
template <int kThreads, typename T>
__device__ T block_sum(T value) {
  __shared__ T sums[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // of the readers of an earlier call
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = sums[0];
  for (int i = 1; i < kThreads / kWarp; ++i) total += sums[i];
  return total;
}

}  // namespace mgrpo
