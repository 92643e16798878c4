// The clipped loss of a run of tokens, its gradient and its sums, kLanes tokens at a time.
#pragma once

#include <math.h>

#include "grpo_loss.h"
#include "kernels.h"
#include "simd.h"
#include "vector_math.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

// Stands for -inf, so that two of them differ by 0; e^(-1e4) is exactly 0.
constexpr float kLeastLogprob = -1e4f;
// Below this many tokens, waking the threads costs more than they save.
constexpr int64_t kLeastParallelTokens = 4 * kLossChunk;

typedef uint8_t u8v __attribute__((vector_size(kLanes)));

MGRPO_INLINE i32v load_mask(const bool* p, int count) {
  u8v bytes = {};
  std::memcpy(&bytes, p, static_cast<size_t>(count));
  return __builtin_convertvector(bytes, i32v) != isplat(0);
}

MGRPO_INLINE f32v load_tokens(const float* p, int count) {
  return count == kLanes ? load(p) : load_part(p, count, 0.0f);
}

MGRPO_INLINE void store_tokens(float* p, f32v v, int count) {
  if (count == kLanes) return store(p, v);
  store_part(p, v, count);
}

// Sums over mask tokens, in the order of LossOutputs with the loss first.
struct LossSums {
  f32v term[1 + kNumMetrics];
};

// Computed before any token's loss.
struct LossContext {
  LossTokens tokens;
  LossOptions options;
  const float* token_weights;    // [N], 1 / mask tokens of the sequence, or null for 1
  const float* mean_log_ratios;  // [N], or null for the ratio of each token
  int64_t num_active;
  double denominator;
};

MGRPO_INLINE f32v clean(f32v logprob, i32v active) {
  const f32v v = select(active, logprob, splat(0.0f));
  return v < splat(kLeastLogprob) ? splat(kLeastLogprob) : v;
}

MGRPO_INLINE int64_t clamp_token(int64_t position, int64_t num_tokens) {
  return position < 0 ? 0 : position > num_tokens ? num_tokens : position;
}

// A compiled graph does not check cu_seqlens, so no value may cause an access outside the tokens.
MGRPO_INLINE int64_t sequence_start(const LossTokens& tokens, int64_t sequence) {
  if (tokens.cu_seqlens) return clamp_token(tokens.cu_seqlens[sequence], tokens.num_tokens);
  return sequence * (tokens.num_tokens / tokens.num_sequences);
}

int64_t sequence_of(const LossTokens& tokens, int64_t token) {
  if (!tokens.cu_seqlens) return token / (tokens.num_tokens / tokens.num_sequences);
  int64_t low = 0, high = tokens.num_sequences;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (tokens.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return low;
}

// One value a sequence -> one a token, for `size` tokens from `start`.
void expand(const LossTokens& tokens, const float* values, int64_t start, int64_t size, float* out) {
  const int64_t end = start + size;
  int64_t sequence = sequence_of(tokens, start);
  for (int64_t t = start; t < end; ++sequence) {
    const bool last = sequence + 1 >= tokens.num_sequences;
    const int64_t next = last ? end : sequence_start(tokens, sequence + 1);
    const float value = sequence < tokens.num_sequences ? values[sequence] : 0.0f;
    for (; t < end && t < next; ++t) out[t - start] = value;
  }
}

// Values that one run of tokens shares with its sequences.
struct Expanded {
  float advantage[kLossChunk], weight[kLossChunk], mean_log_ratio[kLossChunk];
};

// `count` tokens from `t`, which are those from `i` of the expanded run. Follows reference.py line by line.
MGRPO_INLINE void loss_step(const LossContext& context, const Expanded& expanded, int64_t t, int64_t i, int count,
                            float inverse, LossSums* sums, const LossOutputs& outputs) {
  const LossTokens& tokens = context.tokens;
  const LossOptions& options = context.options;
  const f32v zero = {}, one = splat(1.0f);
  const i32v active = load_mask(tokens.mask + t, count);
  const f32v raw = load_tokens(tokens.logprob + t, count);
  const f32v current = clean(raw, active);
  const f32v old = tokens.old_logprob ? clean(load_tokens(tokens.old_logprob + t, count), active) : current;
  const float* advantages = tokens.advantage_by_token ? tokens.advantage + t : expanded.advantage + i;
  const f32v advantage = select(active, load_tokens(advantages, count), zero);

  const f32v log_ratio = context.mean_log_ratios
                             ? load_tokens(expanded.mean_log_ratio + i, count) + (current - current)
                             : current - old;
  const f32v ratio = exponential(log_ratio).exp;
  f32v clipped = ratio < splat(options.ratio_low) ? splat(options.ratio_low) : ratio;
  clipped = (clipped > splat(options.ratio_high) ? splat(options.ratio_high) : clipped) * advantage;
  const f32v product = ratio * advantage;
  f32v value = clipped < product ? clipped : product;
  value = clipped == clipped ? value : clipped;
  if (options.dual_clip > 0) {
    const f32v bound = advantage * options.dual_clip;
    const f32v bounded = value < bound ? bound : value;
    value = advantage < zero ? bounded : value;
  }
  const i32v moves = product == value;
  const f32v held = advantage == zero ? zero : value;
  f32v surrogate = moves ? product : held;
  f32v slope = moves ? product : zero;  // of the surrogate by the log-prob

  f32v weight = one;
  if (tokens.rollout_logprob) {
    const f32v rollout = clean(load_tokens(tokens.rollout_logprob + t, count), active);
    weight = exponential(old - rollout).exp;
    const f32v capped = weight > splat(options.tis_cap) ? splat(options.tis_cap) : weight;
    surrogate *= capped;
    slope = moves ? slope * capped : zero;
  }
  f32v loss = -surrogate, dlogprob = -slope;

  f32v kl = zero;
  if (tokens.ref_logprob) {
    const f32v gap = clean(load_tokens(tokens.ref_logprob + t, count), active) - current;
    f32v dkl;
    if (options.kl == KlEstimate::k1) {
      kl = -gap;
      dkl = one;
    } else if (options.kl == KlEstimate::k2) {
      kl = gap * gap * 0.5f;
      dkl = -gap;
    } else {
      const Exponential e = exponential(gap);
      kl = e.expm1_less;
      dkl = -e.expm1;
    }
    if (options.kl_coef > 0) {
      loss += kl * options.kl_coef;
      dlogprob += dkl * options.kl_coef;
    }
  }
  f32v entropy = zero;
  if (tokens.entropy) {
    entropy = select(active, load_tokens(tokens.entropy + t, count), zero);
    if (options.entropy_coef != 0) loss -= entropy * options.entropy_coef;
  }

  const f32v share = context.token_weights ? load_tokens(expanded.weight + i, count) : one;
  if (outputs.dlogprob) {
    const i32v live = active & (raw >= splat(kLeastLogprob));
    store_tokens(outputs.dlogprob + t, select(live, dlogprob * (share * inverse), zero), count);
  }
  if (outputs.dentropy)
    store_tokens(outputs.dentropy + t, select(active, share * (-options.entropy_coef * inverse), zero), count);
  if (!sums) return;
  const i32v low = (ratio < splat(options.ratio_low)) & (advantage < zero);
  const i32v high = (ratio > splat(options.ratio_high)) & (advantage > zero);
  const i32v above = weight > splat(options.tis_cap);
  sums->term[0] += select(active, loss * share, zero);
  sums->term[1] += select(active, ratio, zero);
  sums->term[2] += select(active & low, one, zero);
  sums->term[3] += select(active & high, one, zero);
  sums->term[4] += select(active, kl, zero);
  sums->term[5] += entropy;
  sums->term[6] += select(active, select(above, splat(options.tis_cap), weight), zero);
  sums->term[7] += select(active & above, one, zero);
}

// At most kLossChunk tokens from `start`; outputs are those of all tokens. `totals` [1 + kNumMetrics] or null.
void loss_run(const LossContext& context, int64_t start, int64_t size, double* totals, const LossOutputs& outputs) {
  const LossTokens& tokens = context.tokens;
  Expanded expanded;
  if (!tokens.advantage_by_token) expand(tokens, tokens.advantage, start, size, expanded.advantage);
  if (context.token_weights) expand(tokens, context.token_weights, start, size, expanded.weight);
  if (context.mean_log_ratios) expand(tokens, context.mean_log_ratios, start, size, expanded.mean_log_ratio);
  const float inverse = static_cast<float>(1.0 / context.denominator);
  LossSums sums = {};
  LossSums* const wanted = totals ? &sums : nullptr;
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    loss_step(context, expanded, start + i, i, kLanes, inverse, wanted, outputs);
  const int rest = static_cast<int>(size - whole);
  if (rest) loss_step(context, expanded, start + whole, whole, rest, inverse, wanted, outputs);
  if (totals)
    for (int k = 0; k <= kNumMetrics; ++k) totals[k] = static_cast<double>(reduce_add(sums.term[k]));
}

int64_t count_active(const bool* mask, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t t = first; t < last; ++t) count += mask[t];
  return count;
}

// Sum over a sequence of the mask tokens' log-ratios.
double sum_log_ratios(const LossTokens& tokens, int64_t first, int64_t last) {
  double total = 0;
  for (int64_t start = first; start < last; start += kLossChunk) {
    const int64_t end = last - start < kLossChunk ? last : start + kLossChunk;
    f32v sum = {};
    for (int64_t t = start; t < end; t += kLanes) {
      const int count = end - t < kLanes ? static_cast<int>(end - t) : kLanes;
      const i32v active = load_mask(tokens.mask + t, count);
      const f32v current = clean(load_tokens(tokens.logprob + t, count), active);
      sum += current - (tokens.old_logprob ? clean(load_tokens(tokens.old_logprob + t, count), active) : current);
    }
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

// Counts and, for the ratio of the sequence, means.
LossContext loss_context(const LossTokens& tokens, const LossOptions& options, const LossScratch& scratch,
                         int num_threads) {
  const float denominator = options.normalizer ? *options.normalizer : options.denominator;
  LossContext context = {tokens, options, nullptr, nullptr, 0, static_cast<double>(denominator)};
  const bool parallel = tokens.num_tokens >= kLeastParallelTokens;
  float* const weights = scratch.sequences;
  float* const means = scratch.sequences + tokens.num_sequences;
  if (options.sequence_mean || options.sequence_ratio) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (parallel)
    for (int64_t n = 0; n < tokens.num_sequences; ++n) {
      const int64_t first = sequence_start(tokens, n), last = sequence_start(tokens, n + 1);
      const int64_t count = count_active(tokens.mask, first, last);
      const double divisor = count > 0 ? static_cast<double>(count) : 1.0;
      weights[n] = static_cast<float>(1.0 / divisor);
      if (options.sequence_ratio) means[n] = static_cast<float>(sum_log_ratios(tokens, first, last) / divisor);
    }
    context.token_weights = options.sequence_mean ? weights : nullptr;
    context.mean_log_ratios = options.sequence_ratio ? means : nullptr;
  }
  context.num_active = count_active(tokens.mask, 0, tokens.num_tokens);
  if (options.count_tokens && !options.normalizer)
    context.denominator = context.num_active > 0 ? static_cast<double>(context.num_active) : 1.0;
  return context;
}

// Loss, metrics and the gradients whose outputs are given.
void loss_of_tokens(const LossContext& context, const LossScratch& scratch, const LossOutputs& outputs,
                    int num_threads) {
  const int64_t num_tokens = context.tokens.num_tokens, num_chunks = (num_tokens + kLossChunk - 1) / kLossChunk;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_tokens >= kLeastParallelTokens)
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int64_t start = c * kLossChunk, left = num_tokens - start;
    loss_run(context, start, left < kLossChunk ? left : kLossChunk, scratch.sums + c * (1 + kNumMetrics), outputs);
  }
  double totals[1 + kNumMetrics] = {};
  for (int64_t c = 0; c < num_chunks; ++c)
    for (int k = 0; k <= kNumMetrics; ++k) totals[k] += scratch.sums[c * (1 + kNumMetrics) + k];
  outputs.loss[0] = static_cast<float>(totals[0] / context.denominator);
  const double active = context.num_active > 0 ? static_cast<double>(context.num_active) : 1.0;
  for (int k = 0; k < kNumMetrics; ++k) outputs.metrics[k] = static_cast<float>(totals[1 + k] / active);
}

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
