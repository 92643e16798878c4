// Log-probability, entropy, log-sum-exp and self-certainty of rows of logits, and their gradient. A block for each row.
//
// Fused: temperature, softcap, both sums of the softmax and the gather, in one read of the logits [T, V] with one
// exponential a logit; backward of all four outputs in one read and one write, over the logits themselves if asked.
// A thread keeps sums of its own and moves them to a larger maximum once in kUnroll vectors; threads meet after the
// loop. The order of the sums depends on V alone, so a row's bits depend on nothing but the row.
#include "token_logprob.h"

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors in flight: 64 bytes a thread, 64 KiB of a multiprocessor at half occupancy
constexpr int64_t kIgnoredTarget = -100;
// 2^x below this is taken as 0, which it is beside the 1 of the largest element.
constexpr float kLeastExponent = -126.0f;
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
    const float x = (z - top) * scale, near = max_nan(x, kLeastExponent);
    const float e = x < kLeastExponent ? 0.0f : exp2_approx(near);
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

template <bool kCertainty>
__device__ Sums<kCertainty> block_merge(Sums<kCertainty> own, float scale) {
  __shared__ Sums<kCertainty> shared[kThreads / kWarp];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Sums<kCertainty> other;
    other.top = shuffle_xor(own.top, mask);
    other.exp = shuffle_xor(own.exp, mask);
    other.exp_x = shuffle_xor(own.exp_x, mask);
    if (kCertainty) {
      other.finite_x = shuffle_xor(own.finite_x, mask);
      other.num_finite = shuffle_xor(own.num_finite, mask);
    }
    own.merge(other, scale);
  }
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = own;
  __syncthreads();
  own = shared[0];
  for (int i = 1; i < kThreads / kWarp; ++i) own.merge(shared[i], scale);
  return own;
}

template <typename T, bool kCapped, bool kCertainty>
__global__ void __launch_bounds__(kThreads) token_logprob_fwd_kernel(TokenLogprobForward args) {
  constexpr int kSize = Vector<T>::kSize;
  const LogitRows& rows = args.rows;
  const int64_t t = blockIdx.x;
  const float temperature = temperature_of(rows, t);
  const bool active = is_active(rows, t), valid = is_valid(rows, t, temperature);
  if (!active || !valid) {
    if (threadIdx.x != 0) return;
    const float value = active ? NAN : 0.0f;
    args.logprob[t] = args.entropy[t] = args.lse[t] = value;
    if (kCertainty) {
      args.self_certainty[t] = value;
      args.num_finite[t] = 0;
    }
    return;
  }
  const auto* row = static_cast<const typename T::Bits*>(rows.logits) + t * rows.stride;  // [V]
  const bool aligned = is_aligned(row);
  const float scale = kLog2e / temperature;
  const int64_t num_vectors = (rows.vocabulary + kSize - 1) / kSize;
  Sums<kCertainty> sums;
  for (int64_t first = threadIdx.x; first < num_vectors; first += kThreads * kUnroll) {
    Vector<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = load_at<T>(row, first + u * kThreads, rows.vocabulary, aligned);
    float z[kUnroll * kSize], highest = -INFINITY;
#pragma unroll
    for (int k = 0; k < kUnroll * kSize; ++k) {
      z[k] = capped<kCapped>(T::from(vectors[k / kSize].bits[k % kSize]), rows.softcap);
      // What fills up the last vectors must not be lifted to minus the cap.
      if (kCapped && (first + k / kSize * kThreads) * kSize + k % kSize >= rows.vocabulary) z[k] = -INFINITY;
      highest = max_nan(highest, z[k]);
    }
    sums.move(max_nan(sums.top, highest), scale);
#pragma unroll
    for (int k = 0; k < kUnroll * kSize; ++k) sums.add(z[k], scale);
  }
  sums = block_merge(sums, scale);
  if (threadIdx.x != 0) return;
  // The largest element adds 1: less means that every logit is -inf.
  if (sums.exp < 0.5f) sums.exp = sums.exp_x = 0;
  const float log_exp = log2f(sums.exp);
  const float z_target = capped<kCapped>(T::from(row[rows.targets[t]]), rows.softcap);
  args.logprob[t] = kLn2 * ((z_target - sums.top) * scale - log_exp);
  args.entropy[t] = kLn2 * (log_exp - sums.exp_x / sums.exp);
  args.lse[t] = sums.top / temperature + kLn2 * log_exp;
  if (kCertainty) {
    args.self_certainty[t] = kLn2 * (log_exp - sums.finite_x / sums.num_finite);
    args.num_finite[t] = sums.num_finite;
  }
}

// dz = onehot (1(j = y) - p) + p (constant + slope a) - uniform, a = z - lse.
struct RowGrad {
  float constant = 0, slope = 0, onehot = 0, uniform = 0;
  __device__ bool is_zero() const { return constant == 0 && slope == 0 && onehot == 0 && uniform == 0; }
};

__device__ RowGrad row_grad(const TokenLogprobBackward& args, int64_t t) {
  RowGrad grad;
  if (args.dlogprob && args.logprob[t] != -INFINITY) grad.onehot = args.dlogprob[t];
  if (args.dentropy) {
    grad.constant -= args.dentropy[t] * args.entropy[t];
    grad.slope = -args.dentropy[t];
  }
  if (args.dlse) grad.constant += args.dlse[t];
  if (args.dself_certainty) {
    grad.constant += args.dself_certainty[t];
    grad.uniform = args.dself_certainty[t] / fmaxf(args.num_finite[t], 1.0f);
  }
  return grad;
}

// The gradient of one logit without the target's one-hot term; exponents in powers of 2.
template <bool kCapped>
struct Gradient {
  float scale, anchor_z, anchor_exponent, constant, slope, uniform, softcap;

  __device__ __forceinline__ float operator()(float z) const {
    const float exponent = fmaf(z - anchor_z, scale, anchor_exponent), x = max_nan(exponent, kLeastExponent);
    const float e = exp2_approx(x), p = exponent < kLeastExponent ? 0.0f : e;
    float dz = p * fmaf(x, slope, constant);
    if (z > -INFINITY) dz -= uniform;
    if (kCapped) dz *= 1.0f - (z / softcap) * (z / softcap);
    return dz;
  }
};

template <typename T, bool kCapped>
__global__ void __launch_bounds__(kThreads) token_logprob_bwd_kernel(TokenLogprobBackward args) {
  constexpr int kSize = Vector<T>::kSize;
  const LogitRows& rows = args.rows;
  const int64_t t = blockIdx.x, vocabulary = rows.vocabulary, num_vectors = (vocabulary + kSize - 1) / kSize;
  const auto* row = static_cast<const typename T::Bits*>(rows.logits) + t * rows.stride;       // [V]
  auto* out = static_cast<typename T::Bits*>(args.dlogits) + t * args.dlogits_stride;          // [V], perhaps the row
  const bool aligned = is_aligned(row) && is_aligned(out);
  const float temperature = temperature_of(rows, t);
  const bool active = is_active(rows, t), valid = is_valid(rows, t, temperature);
  const RowGrad grad = active ? row_grad(args, t) : RowGrad();
  const float lse = valid ? args.lse[t] : NAN;
  const bool undefined = lse != lse;
  if (grad.is_zero() || undefined) {
    Vector<T> fill;
    for (int k = 0; k < kSize; ++k) fill.bits[k] = T::to(grad.is_zero() ? 0.0f : NAN);
    for (int64_t v = threadIdx.x; v < num_vectors; v += kThreads) store_at<T>(out, v, vocabulary, aligned, fill);
    return;
  }
  const int64_t column = rows.targets[t];
  const float z_target = capped<kCapped>(T::from(row[column]), rows.softcap), logprob = args.logprob[t];
  __syncthreads();  // before any thread writes over the target
  // Log-probs are found about the target's, or about minus log-sum-exp, whichever is smaller and so rounded less.
  const bool about_target = -logprob < fabsf(lse);
  const float inverse = 1.0f / temperature;
  const Gradient<kCapped> gradient = {inverse * kLog2e,
                                      about_target ? z_target : 0.0f,
                                      (about_target ? logprob : -lse) * kLog2e,
                                      (grad.constant - grad.onehot) * inverse,
                                      grad.slope * kLn2 * inverse,
                                      grad.uniform * inverse,
                                      rows.softcap};
  for (int64_t v = threadIdx.x; v < num_vectors; v += kThreads) {
    Vector<T> vector = load_at<T>(row, v, vocabulary, aligned);
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      vector.bits[k] = T::to(gradient(capped<kCapped>(T::from(vector.bits[k]), rows.softcap)));
    store_at<T>(out, v, vocabulary, aligned, vector);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  // The target again, with 1 - p free of the rounding of p.
  Gradient<kCapped> own = gradient;
  own.constant = grad.constant * inverse;
  const float complement = logprob > -INFINITY ? -expm1f(logprob) : 1.0f;
  const float tanh = kCapped ? z_target / rows.softcap : 0.0f;
  out[column] = T::to(own(z_target) + grad.onehot * complement * inverse * (1.0f - tanh * tanh));
}

template <typename T>
void forward(const TokenLogprobForward& args) {
  const int64_t grid = args.rows.num_rows;
  const bool has_cap = args.rows.softcap > 0, certainty = args.self_certainty;
  if (has_cap && certainty) return launch(token_logprob_fwd_kernel<T, true, true>, grid, kThreads, args.executor, args);
  if (has_cap) return launch(token_logprob_fwd_kernel<T, true, false>, grid, kThreads, args.executor, args);
  if (certainty) return launch(token_logprob_fwd_kernel<T, false, true>, grid, kThreads, args.executor, args);
  launch(token_logprob_fwd_kernel<T, false, false>, grid, kThreads, args.executor, args);
}

template <typename T>
void backward(const TokenLogprobBackward& args) {
  if (args.rows.softcap > 0)
    return launch(token_logprob_bwd_kernel<T, true>, args.rows.num_rows, kThreads, args.executor, args);
  launch(token_logprob_bwd_kernel<T, false>, args.rows.num_rows, kThreads, args.executor, args);
}

}  // namespace

void launch_token_logprob_fwd(const TokenLogprobForward& args) {
  switch (args.rows.dtype) {
    case Dtype::f32: return forward<F32>(args);
    case Dtype::bf16: return forward<Bf16>(args);
    case Dtype::f16: return forward<F16>(args);
  }
}

void launch_token_logprob_bwd(const TokenLogprobBackward& args) {
  switch (args.rows.dtype) {
    case Dtype::f32: return backward<F32>(args);
    case Dtype::bf16: return backward<Bf16>(args);
    case Dtype::f16: return backward<F16>(args);
  }
}

}  // namespace mgrpo
