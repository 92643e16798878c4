// Clipped policy-gradient loss, its metrics and its gradient, from log-probs or from rows of logits.
//
// Fused: every term and its derivative, the seven metrics and their sums, in one read of each token tensor and one
// write of each gradient: one launch for the tokens, one of a single block for the totals, and one before them where a
// ratio or a mean belongs to the sequence. Every block counts the mask's tokens for itself (1 B a token, from the
// second-level cache) rather than wait for a launch that does. Sums meet in fp64 in a fixed order. From logits: see
// resident_row.h.
#include "grpo_loss.h"

#include "device.h"
#include "loss_terms.h"
#include "resident_row.h"

namespace mgrpo {
namespace {

constexpr int kThreads = 256;
constexpr int kTerms = 1 + kNumMetrics;
static_assert(kLossChunk % kThreads == 0, "a chunk is shared evenly");

// 1 / mask tokens and mean log-ratio of each sequence.
__global__ void __launch_bounds__(kThreads)
    grpo_loss_sequences_kernel(LossTokens tokens, LossOptions options, LossScratch scratch) {
  const int64_t n = blockIdx.x, first = sequence_start(tokens, n), last = sequence_start(tokens, n + 1);
  __shared__ int counts[kThreads / kWarp];
  const int64_t count = count_active<kThreads>(tokens, first, last, counts);
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
  const int64_t n = needs_sequence(tokens, options) ? sequence_of(tokens, t) : 0;
  const float entropy = tokens.entropy ? tokens.entropy[t] : 0.0f;
  const TokenInputs inputs = load_token(tokens, options, scratch, t, n);
  const TokenTerms terms = token_terms(inputs, tokens, options, tokens.logprob[t], entropy, inverse);
  if (outputs.dlogprob) outputs.dlogprob[t] = terms.dlogprob;
  if (outputs.dentropy) outputs.dentropy[t] = terms.dentropy;
  const bool above = terms.weight > options.tis_cap;
  sums[0] += terms.loss;
  sums[1] += terms.ratio;
  sums[2] += terms.clips_low;
  sums[3] += terms.clips_high;
  sums[4] += terms.kl;
  sums[5] += entropy;
  sums[6] += above ? options.tis_cap : terms.weight;
  sums[7] += above;
}

// A block for each chunk of tokens.
__global__ void __launch_bounds__(kThreads)
    grpo_loss_fwd_kernel(LossTokens tokens, LossOptions options, LossScratch scratch, LossOutputs outputs) {
  __shared__ int counts[kThreads / kWarp];
  const int64_t num_active =
      needs_count(options) ? count_active<kThreads>(tokens, 0, tokens.num_tokens, counts) : 0;
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
  __shared__ int counts[kThreads / kWarp];
  const int64_t num_active = count_active<kThreads>(tokens, 0, tokens.num_tokens, counts);
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

// Tokens without a sequence, which only invalid boundaries cause, have no statistics of one.
LossOptions usable(const LossTokens& tokens, LossOptions options) {
  if (tokens.num_sequences == 0) options.sequence_ratio = options.sequence_mean = false;
  return options;
}

void launch_sequences(const LossTokens& tokens, const LossOptions& options, const LossScratch& scratch,
                      Executor executor) {
  if (options.sequence_ratio || options.sequence_mean)
    launch(grpo_loss_sequences_kernel, tokens.num_sequences, kThreads, executor, tokens, options, scratch);
}

// The loss, the metrics and the gradients whose outputs are given.
void launch_sums(const LossTokens& tokens, const LossOptions& options, const LossScratch& scratch,
                 const LossOutputs& outputs, Executor executor) {
  launch(grpo_loss_fwd_kernel, (tokens.num_tokens + kLossChunk - 1) / kLossChunk, kThreads, executor, tokens, options,
         scratch, outputs);
  launch(grpo_loss_totals_kernel, 1, kThreads, executor, tokens, options, scratch, outputs);
}

}  // namespace

void launch_grpo_loss_fwd(const GrpoLossForward& args) {
  const LossOptions options = usable(args.tokens, args.options);
  launch_sequences(args.tokens, options, args.scratch, args.executor);
  launch_sums(args.tokens, options, args.scratch, args.outputs, args.executor);
}

// With the rows in shared memory one read of the logits and one write; otherwise, statistics of the rows, the loss of
// their tokens and the gradient of the rows: two reads and one write.
void launch_logits_grpo_loss_fwd(const LogitsGrpoLossForward& args) {
  LogitsGrpoLossForward fused = args;
  fused.options = usable(args.tokens, args.options);
  if (args.dlogits && !fused.options.sequence_ratio) {
    const RowPlan plan = plan_rows(args.rows);
    if (plan.num_clusters > 0) {
      launch_sequences(args.tokens, fused.options, args.scratch, args.executor);
      launch_resident_rows(fused, plan);
      const LossOutputs sums = {args.outputs.loss, args.outputs.metrics, nullptr, nullptr};
      return launch_sums(args.tokens, fused.options, args.scratch, sums, args.executor);
    }
  }
  LogitRows rows = args.rows;
  rows.mask = args.tokens.mask;
  launch_token_logprob_fwd({rows, args.logprob, args.entropy, args.lse, nullptr, nullptr, args.executor});
  launch_grpo_loss_fwd({args.tokens, args.options, args.scratch, args.outputs, args.executor});
  if (args.dlogits)
    launch_token_logprob_bwd({rows, args.logprob, args.entropy, args.lse, nullptr, args.outputs.dlogprob,
                              args.outputs.dentropy, nullptr, nullptr, args.dlogits, rows.vocabulary, args.executor});
}

}  // namespace mgrpo
