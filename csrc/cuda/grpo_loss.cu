// Clipped policy-gradient loss, its metrics and its gradient, from log-probs or from rows of logits.
//
// Fused: every term and its derivative, the seven metrics and their sums, in one read of each token tensor and one
// write of each gradient: one launch for the tokens, one of a single block for the totals, and one before them where a
// ratio or a mean belongs to the sequence. Every block counts the mask's tokens for itself (1 B a token, from the
// second-level cache) rather than wait for a launch that does. Sums meet in fp64 in a fixed order.
#include "grpo_loss.h"

#include "device.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int kTerms = 1 + kNumMetrics;
// Stands for -inf, so that two of them differ by 0; e^(-1e4) is exactly 0.
constexpr float kLeastLogprob = -1e4f;
static_assert(kLossChunk % kThreads == 0, "a chunk is shared evenly");

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

__device__ int64_t count_active(const LossTokens& tokens, int64_t first, int64_t last) {
  int mine = 0;
  for (int64_t t = first + threadIdx.x; t < last; t += kThreads) mine += tokens.mask[t];
  return block_sum<kThreads>(mine);
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

__device__ double denominator_of(const LossOptions& options, int64_t num_active) {
  if (options.normalizer) return *options.normalizer;
  if (!options.count_tokens) return options.denominator;
  return num_active > 0 ? static_cast<double>(num_active) : 1.0;
}

// 1 / mask tokens and mean log-ratio of each sequence.
__global__ void __launch_bounds__(kThreads)
    grpo_loss_sequences_kernel(LossTokens tokens, LossOptions options, LossScratch scratch) {
  const int64_t n = blockIdx.x, first = sequence_start(tokens, n), last = sequence_start(tokens, n + 1);
  const int64_t count = count_active(tokens, first, last);
  const double divisor = count > 0 ? static_cast<double>(count) : 1.0;
  double mine = 0;
  if (options.sequence_ratio && tokens.old_logprob)
    for (int64_t t = first + threadIdx.x; t < last; t += kThreads)
      if (tokens.mask[t]) mine += clean(tokens.logprob[t]) - clean(tokens.old_logprob[t]);
  const double total = block_sum<kThreads>(mine);
  if (threadIdx.x != 0) return;
  scratch.sequences[n] = static_cast<float>(1.0 / divisor);
  scratch.sequences[tokens.num_sequences + n] = static_cast<float>(total / divisor);
}

// Adds a mask token's terms and writes its gradients.
__device__ void add_token(const LossTokens& tokens, const LossOptions& options, const LossScratch& scratch,
                          const LossOutputs& outputs, int64_t t, float inverse, float (&sums)[kTerms]) {
  const bool by_sequence = !tokens.advantage_by_token || options.sequence_mean || options.sequence_ratio;
  const int64_t n = by_sequence && tokens.num_sequences > 0 ? sequence_of(tokens, t) : 0;
  const float raw = tokens.logprob[t], current = clean(raw);
  const float old = tokens.old_logprob ? clean(tokens.old_logprob[t]) : current;
  const float advantage = tokens.advantage_by_token      ? tokens.advantage[t]
                          : tokens.num_sequences > 0 ? tokens.advantage[n]
                                                         : 0.0f;
  const float log_ratio = options.sequence_ratio
                              ? scratch.sequences[tokens.num_sequences + n] + (current - current)
                              : current - old;
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

  float weight = 1;
  if (tokens.rollout_logprob) {
    weight = expf(old - clean(tokens.rollout_logprob[t]));
    const float capped = weight > options.tis_cap ? options.tis_cap : weight;
    surrogate *= capped;
    if (moves) slope *= capped;
  }
  float loss = -surrogate, dlogprob = -slope;

  float kl = 0;
  if (tokens.ref_logprob) {
    const float gap = clean(tokens.ref_logprob[t]) - current;
    float dkl = 1;
    if (options.kl == KlEstimate::k1) {
      kl = -gap;
    } else if (options.kl == KlEstimate::k2) {
      kl = gap * gap * 0.5f;
      dkl = -gap;
    } else {
      kl = expm1_less(gap);
      dkl = -expm1f(gap);
    }
    if (options.kl_coef > 0) {
      loss += kl * options.kl_coef;
      dlogprob += dkl * options.kl_coef;
    }
  }
  const float entropy = tokens.entropy ? tokens.entropy[t] : 0.0f;
  if (options.entropy_coef != 0) loss -= entropy * options.entropy_coef;

  const float share = options.sequence_mean ? scratch.sequences[n] : 1.0f;
  if (outputs.dlogprob) outputs.dlogprob[t] = raw >= kLeastLogprob ? dlogprob * (share * inverse) : 0.0f;
  if (outputs.dentropy) outputs.dentropy[t] = share * (-options.entropy_coef * inverse);
  const bool above = weight > options.tis_cap;
  sums[0] += loss * share;
  sums[1] += ratio;
  sums[2] += ratio < options.ratio_low && advantage < 0;
  sums[3] += ratio > options.ratio_high && advantage > 0;
  sums[4] += kl;
  sums[5] += entropy;
  sums[6] += above ? options.tis_cap : weight;
  sums[7] += above;
}

// A block for each chunk of tokens.
__global__ void __launch_bounds__(kThreads)
    grpo_loss_fwd_kernel(LossTokens tokens, LossOptions options, LossScratch scratch, LossOutputs outputs) {
  const bool counts = options.count_tokens && !options.normalizer;
  const int64_t num_active = counts ? count_active(tokens, 0, tokens.num_tokens) : 0;
  const float inverse = static_cast<float>(1.0 / denominator_of(options, num_active));
  float sums[kTerms] = {};
  for (int64_t i = threadIdx.x; i < kLossChunk; i += kThreads) {
    const int64_t t = blockIdx.x * kLossChunk + i;
    if (t >= tokens.num_tokens) break;
    if (tokens.mask[t]) {
      add_token(tokens, options, scratch, outputs, t, inverse, sums);
      continue;
    }
    if (outputs.dlogprob) outputs.dlogprob[t] = 0;
    if (outputs.dentropy) outputs.dentropy[t] = 0;
  }
  for (int k = 0; k < kTerms; ++k) {
    const double total = block_sum<kThreads>(static_cast<double>(sums[k]));
    if (threadIdx.x == 0) scratch.sums[blockIdx.x * kTerms + k] = total;
  }
}

// One block: totals over the chunks.
__global__ void __launch_bounds__(kThreads)
    grpo_loss_totals_kernel(LossTokens tokens, LossOptions options, LossScratch scratch, LossOutputs outputs) {
  const int64_t num_active = count_active(tokens, 0, tokens.num_tokens);
  const int64_t num_chunks = (tokens.num_tokens + kLossChunk - 1) / kLossChunk;
  const double active = num_active > 0 ? static_cast<double>(num_active) : 1.0;
  for (int k = 0; k < kTerms; ++k) {
    double mine = 0;
    for (int64_t c = threadIdx.x; c < num_chunks; c += kThreads) mine += scratch.sums[c * kTerms + k];
    const double total = block_sum<kThreads>(mine);
    if (threadIdx.x != 0) continue;
    if (k == 0)
      outputs.loss[0] = static_cast<float>(total / denominator_of(options, num_active));
    else
      outputs.metrics[k - 1] = static_cast<float>(total / active);
  }
}

}  // namespace

void launch_grpo_loss_fwd(const GrpoLossForward& args) {
  const LossTokens& tokens = args.tokens;
  LossOptions options = args.options;
  // Tokens without a sequence, which only wrong boundaries leave, have no statistics of one.
  if (tokens.num_sequences == 0) options.sequence_ratio = options.sequence_mean = false;
  if (options.sequence_ratio || options.sequence_mean)
    launch(grpo_loss_sequences_kernel, tokens.num_sequences, kThreads, args.executor, tokens, options, args.scratch);
  launch(grpo_loss_fwd_kernel, (tokens.num_tokens + kLossChunk - 1) / kLossChunk, kThreads, args.executor, tokens,
         options, args.scratch, args.outputs);
  launch(grpo_loss_totals_kernel, 1, kThreads, args.executor, tokens, options, args.scratch, args.outputs);
}

// Statistics of the rows, the loss of their tokens, and the gradient of the rows: two reads of the logits and one write.
void launch_logits_grpo_loss_fwd(const LogitsGrpoLossForward& args) {
  LogitRows rows = args.rows;
  rows.mask = args.tokens.mask;
  launch_token_logprob_fwd({rows, args.logprob, args.entropy, args.lse, nullptr, nullptr, args.executor});
  launch_grpo_loss_fwd({args.tokens, args.options, args.scratch, args.outputs, args.executor});
  if (args.dlogits)
    launch_token_logprob_bwd({rows, args.logprob, args.entropy, args.lse, nullptr, args.outputs.dlogprob,
                              args.outputs.dentropy, nullptr, nullptr, args.dlogits, rows.vocabulary, args.executor});
}

}  // namespace mgrpo
