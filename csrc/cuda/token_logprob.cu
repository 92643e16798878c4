// Log-probability, entropy, log-sum-exp and self-certainty of rows of logits, and their gradient. A block for each row.
//
// Fused: temperature, softcap, both sums of the softmax and the gather, in one read of the logits [T, V] with one
// exponential a logit; backward of all four outputs in one read and one write, over the logits themselves if asked.
// A thread keeps its own sums and rescales them to a larger maximum once in kUnroll vectors; threads synchronise after
// the loop. Logits are loaded through a ring in shared memory, so that a multiprocessor has 100 KB in flight. The order
// of the sums depends on V alone, so a row's bits depend on nothing but the row.
#include "token_logprob.h"

#include "device.h"
#include "token_row.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors of a thread between moves of its sums
constexpr int kDepth = 2;   // batches ahead: 128 bytes a thread, 128 KiB of a multiprocessor at four blocks
constexpr int kBackwardUnroll = 2, kBackwardDepth = 3;
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
  const auto add = [&](const Vector<T>(&vectors)[kUnroll], int64_t first) {
    float z[kUnroll][kSize], highest = -INFINITY;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      widen<T>(vectors[u], z[u]);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        z[u][k] = capped<kCapped>(z[u][k], rows.softcap);
        // The padding of the last vectors must not be raised to minus the cap.
        if (kCapped && (first + u * kThreads) * kSize + k >= rows.vocabulary) z[u][k] = -INFINITY;
        highest = max_nan(highest, z[u][k]);
      }
    }
    sums.move(max_nan(sums.top, highest), scale);
#pragma unroll
    for (int k = 0; k < kUnroll * kSize; ++k) sums.add(z[k / kSize][k % kSize], scale);
  };
  using Ring = RowRing<T, kThreads, kUnroll, kDepth>;
  __shared__ typename Ring::Slots slots;
  const Ring ring(slots, row, rows.vocabulary, aligned);
#pragma unroll 1
  for (int batch = 0; batch < ring.num_batches; ++batch) {
    Vector<T> vectors[kUnroll];
    ring.take(batch, batch % kDepth, vectors);
    add(vectors, int64_t{batch} * Ring::kBatchSize + threadIdx.x);
  }
  // The rest, and a row that is not aligned, in the same order.
#pragma unroll 1
  for (int64_t first = int64_t{ring.num_batches} * Ring::kBatchSize + threadIdx.x; first < num_vectors;
       first += Ring::kBatchSize) {
    Vector<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = load_at<T>(row, first + u * kThreads, rows.vocabulary, aligned);
    add(vectors, first);
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
  const auto gradients = [&](const Vector<T>& vector) {
    float z[kSize];
    widen<T>(vector, z);
#pragma unroll
    for (int k = 0; k < kSize; ++k) z[k] = gradient(capped<kCapped>(z[k], rows.softcap));
    return to_vector<T>(z);
  };
  // Loads in flight are complete before a write, because a thread overwrites only vectors that it alone has read.
  using Ring = RowRing<T, kThreads, kBackwardUnroll, kBackwardDepth>;
  __shared__ typename Ring::Slots slots;
  const Ring ring(slots, row, vocabulary, aligned);
#pragma unroll 1
  for (int batch = 0; batch < ring.num_batches; ++batch) {
    Vector<T> vectors[kBackwardUnroll];
    ring.take(batch, batch % kBackwardDepth, vectors);
    auto* const to = out + (int64_t{batch} * Ring::kBatchSize + threadIdx.x) * kSize;
#pragma unroll
    for (int u = 0; u < kBackwardUnroll; ++u) store_vector<T>(to + u * kThreads * kSize, gradients(vectors[u]));
  }
#pragma unroll 1
  for (int64_t v = int64_t{ring.num_batches} * Ring::kBatchSize + threadIdx.x; v < num_vectors; v += kThreads)
    store_at<T>(out, v, vocabulary, aligned, gradients(load_at<T>(row, v, vocabulary, aligned)));
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
