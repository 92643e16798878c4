// The terms of a token's loss and their derivatives, for the kernels that start from log-probs or from logits.
#pragma once

#include "device.h"
#include "grpo_loss.h"

namespace mgrpo {
namespace {

// Stands for -inf, so that two of them differ by 0; e^(-1e4) is exactly 0.
constexpr float kLeastLogprob = -1e4f;

__device__ float clean(float logprob) { return logprob < kLeastLogprob ? kLeastLogprob : logprob; }

// e^x - 1 - x, which cancels near 0: there its series, exact to fp32 for |x| <= 0.35.
__device__ float expm1_less(float x) {
  if (fabsf(x) > 0.35f) return expm1f(x) - x;
  float q = 2.48015873e-5f;
  q = fmaf(q, x, 1.98412698e-4f);
  q = fmaf(q, x, 1.38888889e-3f);
  q = fmaf(q, x, 8.33333333e-3f);
  q = fmaf(q, x, 4.16666667e-2f);
  q = fmaf(q, x, 1.66666667e-1f);
  q = fmaf(q, x, 0.5f);
  return x * x * q;
}

// Mask tokens of [first, last), by a block of kThreads; `counts` [kThreads / kWarp] is shared memory.
template <int kThreads>
__device__ int64_t count_active(const LossTokens& tokens, int64_t first, int64_t last, int* counts) {
  constexpr int kWidth = sizeof(Vector<F32>);
  const bool* mask = tokens.mask + first;
  int mine = 0;
  int64_t done = 0;
  if (is_aligned(mask)) {
    done = (last - first) / kWidth * kWidth;
    for (int64_t i = threadIdx.x * kWidth; i < done; i += kThreads * kWidth) {
      const Vector<F32> bytes = load_vector<F32>(reinterpret_cast<const uint32_t*>(mask + i));
      // Four bytes of 0 or 1 at a time: their sum is the highest byte of the product.
#pragma unroll
      for (int k = 0; k < 4; ++k) mine += bytes.bits[k] * 0x01010101u >> 24;
    }
  }
  for (int64_t i = done + threadIdx.x; i < last - first; i += kThreads) mine += mask[i];
  return block_sum<kThreads>(mine, counts);
}

__device__ int64_t sequence_start(const LossTokens& tokens, int64_t sequence) {
  if (!tokens.cu_seqlens) return sequence * (tokens.num_tokens / tokens.num_sequences);
  const int64_t start = tokens.cu_seqlens[sequence];
  return start < 0 ? 0 : start > tokens.num_tokens ? tokens.num_tokens : start;
}

__device__ int64_t sequence_of(const LossTokens& tokens, int64_t token) {
  if (!tokens.cu_seqlens) return token / (tokens.num_tokens / tokens.num_sequences);
  int64_t low = 0, high = tokens.num_sequences;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (tokens.cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The same by a whole warp, whose lanes look at 32 boundaries at a time.
__device__ __forceinline__ int64_t warp_sequence_of(const LossTokens& tokens, int64_t token) {
  if (!tokens.cu_seqlens) return token / (tokens.num_tokens / tokens.num_sequences);
  int64_t low = 0, high = tokens.num_sequences;
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + (threadIdx.x % kWarp + 1) * step;
    low += step * warp_sum(static_cast<int>(probe < high && tokens.cu_seqlens[probe] <= token));
    high = low + step < high ? low + step : high;
  }
  return low;
}

__device__ __forceinline__ bool needs_count(const LossOptions& options) {
  return options.count_tokens && !options.normalizer;
}

__device__ double denominator_of(const LossOptions& options, int64_t num_active) {
  if (options.normalizer) return *options.normalizer;
  if (!options.count_tokens) return options.denominator;
  return num_active > 0 ? static_cast<double>(num_active) : 1.0;
}

// Inputs of a token's loss besides its log-prob and entropy.
struct TokenInputs {
  float advantage, old, ref, rollout;
  float share;           // of the token in the loss: 1, or 1 / mask tokens of its sequence
  float mean_log_ratio;  // of its sequence
};

__device__ __forceinline__ bool needs_sequence(const LossTokens& tokens, const LossOptions& options) {
  return tokens.num_sequences > 0 &&
         (!tokens.advantage_by_token || options.sequence_mean || options.sequence_ratio);
}

// Of a token in sequence n.
__device__ __forceinline__ TokenInputs load_token(const LossTokens& tokens, const LossOptions& options,
                                                  const LossScratch& scratch, int64_t t, int64_t n) {
  TokenInputs out;
  out.advantage = tokens.advantage_by_token    ? tokens.advantage[t]
                  : tokens.num_sequences > 0 ? tokens.advantage[n]
                                             : 0.0f;
  out.old = tokens.old_logprob ? tokens.old_logprob[t] : 0.0f;
  out.ref = tokens.ref_logprob ? tokens.ref_logprob[t] : 0.0f;
  out.rollout = tokens.rollout_logprob ? tokens.rollout_logprob[t] : 0.0f;
  out.share = options.sequence_mean ? scratch.sequences[n] : 1.0f;
  out.mean_log_ratio = options.sequence_ratio ? scratch.sequences[tokens.num_sequences + n] : 0.0f;
  return out;
}

struct TokenTerms {
  float loss, ratio, kl, weight;
  bool clips_low, clips_high;
  float dlogprob, dentropy;
};

// `inverse` is 1 / the loss's denominator.
__device__ __forceinline__ TokenTerms token_terms(const TokenInputs& inputs, const LossTokens& tokens,
                                                  const LossOptions& options, float raw, float entropy,
                                                  float inverse) {
  TokenTerms out = {};
  const float current = clean(raw), old = tokens.old_logprob ? clean(inputs.old) : current;
  const float advantage = inputs.advantage;
  const float log_ratio =
      options.sequence_ratio ? inputs.mean_log_ratio + (current - current) : current - old;
  const float ratio = expf(log_ratio);
  float clipped = ratio < options.ratio_low ? options.ratio_low : ratio;
  clipped = (clipped > options.ratio_high ? options.ratio_high : clipped) * advantage;
  const float product = ratio * advantage;
  float value = clipped < product ? clipped : product;
  if (clipped != clipped) value = clipped;
  if (options.dual_clip > 0 && advantage < 0) {
    const float bound = advantage * options.dual_clip;
    if (value < bound) value = bound;
  }
  const bool moves = product == value;
  float surrogate = moves ? product : advantage == 0 ? 0.0f : value;
  float slope = moves ? product : 0.0f;  // of the surrogate by the log-prob

  out.weight = 1;
  if (tokens.rollout_logprob) {
    out.weight = expf(old - clean(inputs.rollout));
    const float capped = out.weight > options.tis_cap ? options.tis_cap : out.weight;
    surrogate *= capped;
    if (moves) slope *= capped;
  }
  float loss = -surrogate, dlogprob = -slope;

  if (tokens.ref_logprob) {
    const float gap = clean(inputs.ref) - current;
    float dkl = 1;
    if (options.kl == KlEstimate::k1) {
      out.kl = -gap;
    } else if (options.kl == KlEstimate::k2) {
      out.kl = gap * gap * 0.5f;
      dkl = -gap;
    } else {
      out.kl = expm1_less(gap);
      dkl = -expm1f(gap);
    }
    if (options.kl_coef > 0) {
      loss += out.kl * options.kl_coef;
      dlogprob += dkl * options.kl_coef;
    }
  }
  if (options.entropy_coef != 0) loss -= entropy * options.entropy_coef;

  out.loss = loss * inputs.share;
  out.ratio = ratio;
  out.clips_low = ratio < options.ratio_low && advantage < 0;
  out.clips_high = ratio > options.ratio_high && advantage > 0;
  out.dlogprob = raw >= kLeastLogprob ? dlogprob * (inputs.share * inverse) : 0.0f;
  out.dentropy = inputs.share * (-options.entropy_coef * inverse);
  return out;
}

}  // namespace
}  // namespace mgrpo
