// Shared by kernels on rows of logits: the rows that count, loads of a row, and the sums of its softmax.
#pragma once

#include "device.h"
#include "token_logprob.h"

namespace mgrpo {
namespace {

constexpr int64_t kIgnoredTarget = -100;
// 2^x below the first is taken as 0, which it is beside the 1 of the largest element; at the second the device gives 0.
constexpr float kLeastExponent = -126.0f;
constexpr float kNothing = -150.0f;
constexpr float kLeastGap = -1000.0f;

__device__ __forceinline__ bool is_active(const LogitRows& rows, int64_t t) {
  return rows.targets[t] != kIgnoredTarget && (!rows.mask || rows.mask[t]);
}

__device__ __forceinline__ float temperature_of(const LogitRows& rows, int64_t t) {
  return rows.temperatures ? rows.temperatures[t] : rows.temperature;
}

__device__ __forceinline__ bool is_valid(const LogitRows& rows, int64_t t, float temperature) {
  return rows.targets[t] >= 0 && rows.targets[t] < rows.vocabulary && temperature > 0 && temperature < INFINITY;
}

template <bool kCapped>
__device__ __forceinline__ float capped(float z, float softcap) {
  return kCapped ? softcap * tanhf(z / softcap) : z;
}

// The vector `v` of a row; beyond its end, and of a row that is not aligned, element by element.
template <typename T>
__device__ __forceinline__ Vector<T> load_at(const typename T::Bits* row, int64_t v, int64_t vocabulary, bool aligned) {
  constexpr int kSize = Vector<T>::kSize;
  if (aligned && (v + 1) * kSize <= vocabulary) return load_vector<T>(row + v * kSize);
  Vector<T> out;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const int64_t i = v * kSize + k;
    out.bits[k] = i < vocabulary ? row[i] : T::to(-INFINITY);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_at(typename T::Bits* row, int64_t v, int64_t vocabulary, bool aligned,
                                         const Vector<T>& vector) {
  constexpr int kSize = Vector<T>::kSize;
  if (aligned && (v + 1) * kSize <= vocabulary) return store_vector<T>(row + v * kSize, vector);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const int64_t i = v * kSize + k;
    if (i < vocabulary) row[i] = vector.bits[k];
  }
}

// Vectors of a row in flight, kBatch of a thread at a time and kDepth batches ahead. A thread copies and reads only its
// own vectors: there is no barrier, and waiting loads take no registers. Only whole batches of an aligned row.
template <typename T, int kThreads, int kBatch, int kDepth>
struct RowRing {
  static constexpr int kBatchSize = kThreads * kBatch;
  using Slots = Vector<T>[kDepth][kBatch][kThreads];
  Slots& slots;  // shared memory
  const typename T::Bits* row;
  int num_batches;

  __device__ __forceinline__ RowRing(Slots& slots, const typename T::Bits* row, int64_t vocabulary, bool aligned)
      : slots(slots), row(row),
        num_batches(aligned ? static_cast<int>(vocabulary / (Vector<T>::kSize * kBatchSize)) : 0) {
    for (int batch = 0; batch < kDepth; ++batch) request(batch, batch);
  }

  __device__ __forceinline__ void request(int batch, int place) const {
    if (batch < num_batches) {
      const typename T::Bits* from = row + (int64_t{batch} * kBatchSize + threadIdx.x) * Vector<T>::kSize;
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        copy_async(&slots[place][u][threadIdx.x], from + u * kThreads * Vector<T>::kSize);
    }
    commit_copies();
  }

  // Batch `batch`, whose place in the ring is batch % kDepth.
  __device__ __forceinline__ void take(int batch, int place, Vector<T> (&out)[kBatch]) const {
    wait_copies(kDepth - 1);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) out[u] = slots[place][u][threadIdx.x];
    request(batch + kDepth, place);
  }
};

// Sums over some of a row about its largest logit, in powers of 2: x = (z - top) scale, scale = log2(e) / temperature.
template <bool kCertainty>
struct Sums {
  float top = -FLT_MAX;
  float exp = 0;         // of 2^x
  float exp_x = 0;       // of 2^x x
  float finite_x = 0;    // of x over the finite logits
  float num_finite = 0;

  __device__ __forceinline__ void move(float to, float scale) {
    const float gap = (top - to) * scale, near = max_nan(gap, kLeastGap), weight = exp2_approx(near);
    exp_x = weight * (exp_x + exp * near);
    exp *= weight;
    if (kCertainty && num_finite > 0) finite_x += num_finite * gap;
    top = to;
  }

  __device__ __forceinline__ void add(float z, float scale) {
    const float x = (z - top) * scale, near = max_nan(x, kNothing), e = exp2_approx(near);
    exp += e;
    exp_x = fmaf(e, near, exp_x);
    if (kCertainty && z > -INFINITY) {
      finite_x += x;
      num_finite += 1;
    }
  }

  __device__ __forceinline__ void merge(Sums other, float scale) {
    const float to = max_nan(top, other.top);
    move(to, scale);
    other.move(to, scale);
    exp += other.exp;
    exp_x += other.exp_x;
    finite_x += other.finite_x;
    num_finite += other.num_finite;
  }
};

}  // namespace
}  // namespace mgrpo
