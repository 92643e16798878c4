// GPU primitives of the kernels. One source for nvcc and, with MGRPO_EMULATE, for a CPU (see emulate.h).
#pragma once

#include <array>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
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

// The same in clusters of blocks, each with `bytes` of dynamic shared memory.
template <typename... Params, typename... Args>
void launch_clusters(void (*kernel)(Params...), int64_t clusters, int cluster, int size, size_t bytes, Executor,
                     const Args&... args) {
  if (clusters > 0) emulated::launch(clusters * cluster, size, [&] { kernel(args...); }, cluster, bytes);
}

// Few, so that each takes several rows.
template <typename... Params>
int resident_clusters(void (*)(Params...), int, int, size_t) {
  return 3;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return emulated::shuffle_xor(value, mask);
}

inline char* dynamic_shared() { return emulated::shared_of(emulated::rank()); }
inline unsigned cluster_rank() { return emulated::rank(); }
inline unsigned cluster_size() { return emulated::cluster.num_blocks; }
template <typename T>
T* in_block(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(emulated::shared_of(rank) + (reinterpret_cast<char*>(mine) - dynamic_shared()));
}
inline void cluster_barrier() { emulated::wait_for(emulated::Wait::cluster); }
inline void copy_async(void* to, const void* from) { emulated::copy(to, from); }
inline void commit_copies() { emulated::commit(); }
inline void wait_copies(int newer) { emulated::wait_copies(static_cast<size_t>(newer)); }

// Flushes what is below the least normal number, as the device does.
inline float exp2_approx(float x) {
  const float out = exp2f(x);
  return out < FLT_MIN ? 0.0f : out;
}
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

inline cudaLaunchConfig_t cluster_config(int64_t clusters, int cluster, int size, size_t bytes, Executor executor,
                                         cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(static_cast<unsigned>(size));
  config.dynamicSmemBytes = bytes;
  config.stream = reinterpret_cast<cudaStream_t>(executor);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// The same in clusters of blocks, each with `bytes` of dynamic shared memory; resident_clusters comes first.
template <typename... Params, typename... Args>
void launch_clusters(void (*kernel)(Params...), int64_t clusters, int cluster, int size, size_t bytes,
                     Executor executor, const Args&... args) {
  if (clusters <= 0) return;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = cluster_config(clusters, cluster, size, bytes, executor, attribute);
  check(cudaLaunchKernelEx(&config, kernel, args...));
}

// How many clusters the current device runs at a time; 0 where the kernel's code is not for clusters or does not fit.
// Allows the kernel all the shared memory there is. Asked once for each device and size: the answer takes a while.
template <typename... Params>
int resident_clusters(void (*kernel)(Params...), int cluster, int size, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 4>, int> known;
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  const std::array<int64_t, 4> key = {reinterpret_cast<intptr_t>(kernel), device, cluster, static_cast<int64_t>(bytes)};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  int clusters = 0;
  if (attributes.ptxVersion >= 90 && bytes <= static_cast<size_t>(most)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config(1, cluster, size, bytes, 0, attribute);
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  }
  return known[key] = clusters;
}

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The start of a block's dynamic shared memory.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 dynamic[];
  return reinterpret_cast<char*>(dynamic);
}

// Of this block within its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// The same place in the shared memory of another block of the cluster.
template <typename T>
__device__ __forceinline__ T* in_block(T* mine, unsigned rank) {
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(theirs);
}
// Waits for every thread of the cluster, whose writes are then visible.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// 16 bytes from global to shared memory, past the registers and the first-level cache.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `newer` (0 to 3) of this thread's latest commits are under way.
__device__ __forceinline__ void wait_copies(int newer) {
  switch (newer) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
  }
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

template <typename T>
__device__ __forceinline__ void widen(const Vector<T>& vector, float (&out)[Vector<T>::kSize]) {
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; ++k) out[k] = T::from(vector.bits[k]);
}
// A word at a time: one instruction for either half.
template <>
__device__ __forceinline__ void widen<Bf16>(const Vector<Bf16>& vector, float (&out)[8]) {
  uint32_t words[4];
  memcpy(words, &vector, sizeof words);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[2 * k] = float_of(words[k] << 16);
    out[2 * k + 1] = float_of(words[k] & 0xffff0000u);
  }
}

// Rounds a vector's worth of values; 16-bit ones two at a time.
template <typename T>
__device__ __forceinline__ Vector<T> to_vector(const float (&values)[Vector<T>::kSize]) {
  Vector<T> out;
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; ++k) out.bits[k] = T::to(values[k]);
  return out;
}
#if !defined(MGRPO_EMULATE)
template <>
__device__ __forceinline__ Vector<Bf16> to_vector<Bf16>(const float (&values)[8]) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) pairs[k] = __floats2bfloat162_rn(values[2 * k], values[2 * k + 1]);
  Vector<Bf16> out;
  memcpy(&out, pairs, sizeof out);
  return out;
}
template <>
__device__ __forceinline__ Vector<F16> to_vector<F16>(const float (&values)[8]) {
  __half2 pairs[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) pairs[k] = __floats2half2_rn(values[2 * k], values[2 * k + 1]);
  Vector<F16> out;
  memcpy(&out, pairs, sizeof out);
  return out;
}
#endif

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

// Sum over a block of kThreads, in one fixed order; every thread gets it. `sums` [kThreads / kWarp] is shared memory.
template <int kThreads, typename T>
__device__ T block_sum(T value, T* sums) {
  value = warp_sum(value);
  __syncthreads();  // of the readers of an earlier call
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = sums[0];
  for (int i = 1; i < kThreads / kWarp; ++i) total += sums[i];
  return total;
}

template <int kThreads, typename T>
__device__ T block_sum(T value) {
  __shared__ T sums[kThreads / kWarp];
  return block_sum<kThreads>(value, sums);
}

}  // namespace mgrpo
