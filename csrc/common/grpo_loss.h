// Arguments of the clipped losses. Letters and pointers: see dtype.h. Token tensors are flat, packed or padded alike.
#pragma once

#include <cstdint>

#include "token_logprob.h"

namespace mgrpo {

enum class KlEstimate : int { k1 = 0, k2 = 1, k3 = 2 };

// Inputs of every token. Outside the mask they may hold anything.
struct LossTokens {
  const float* logprob;          // [T]
  const float* entropy;          // [T] or null
  const float* old_logprob;      // [T], or null for logprob
  const float* ref_logprob;      // [T] or null
  const float* rollout_logprob;  // [T] or null
  const float* advantage;        // [T] or [N]
  bool advantage_by_token;
  const bool* mask;            // [T]
  const int64_t* cu_seqlens;   // [N+1], or null for sequences of one length
  int64_t num_tokens;          // T
  int64_t num_sequences;       // N
};

struct LossOptions {
  float ratio_low, ratio_high;  // the band outside which the clip holds
  float dual_clip;              // 0 for none
  float kl_coef;
  KlEstimate kl;
  float entropy_coef;
  float tis_cap;
  bool sequence_ratio;
  bool sequence_mean;  // each sequence's token mean, not each token, weighs the same
  bool count_tokens;   // the denominator is the number of mask tokens
  float denominator;
  const float* normalizer;  // [1], in place of the denominator; or null
};

// Tokens are summed by chunks of this many, and chunks in their order: results do not depend on the threads.
constexpr int64_t kLossChunk = 1024;
constexpr int kNumMetrics = 7;

struct LossScratch {
  double* sums;      // [chunks, 1 + kNumMetrics]
  float* sequences;  // [2, N]
};

struct LossOutputs {
  float* loss;      // [1]
  float* metrics;   // [kNumMetrics]: ratio, low and high clip, KL, entropy, weight, clipped weight
  float* dlogprob;  // [T] or null; gradients of the loss
  float* dentropy;  // [T] or null
};

struct GrpoLossForward {
  LossTokens tokens;
  LossOptions options;
  LossScratch scratch;
  LossOutputs outputs;
  Executor executor;
};

struct LogitsGrpoLossForward {
  LogitRows rows;       // without mask and softcap
  LossTokens tokens;    // logprob and entropy are the two below; a row outside its mask is not read
  LossOptions options;  // with the ratio of the token
  LossScratch scratch;
  LossOutputs outputs;
  float* logprob;  // [T]
  float* entropy;  // [T]
  float* lse;      // [T]
  void* dlogits;   // [T, V] in dtype, contiguous, or null
  Executor executor;
};

void launch_grpo_loss_fwd(const GrpoLossForward&);
void launch_logits_grpo_loss_fwd(const LogitsGrpoLossForward&);

}  // namespace mgrpo
