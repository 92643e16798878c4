// Log-probability, entropy, log-sum-exp and self-certainty of rows of logits, and their gradient.
//
// Fused: temperature, softcap, both sums of the softmax and the gather, in one read of the logits [T, V]; backward of
// all four outputs in one read and one write, over the logits themselves if asked. TRL's two functions move some 50
// bytes a logit for the same. Threads share rows, so a row's bits depend on nothing but the row.
#include "token_row.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

constexpr int64_t kIgnoredTarget = -100;

MGRPO_INLINE bool is_active(const LogitRows& rows, int64_t t) {
  return rows.targets[t] != kIgnoredTarget && (!rows.mask || rows.mask[t]);
}

MGRPO_INLINE float temperature_of(const LogitRows& rows, int64_t t) {
  return rows.temperatures ? rows.temperatures[t] : rows.temperature;
}

MGRPO_INLINE bool is_valid(const LogitRows& rows, int64_t t, float temperature) {
  return rows.targets[t] >= 0 && rows.targets[t] < rows.vocabulary && temperature > 0 && temperature < INFINITY;
}

template <typename T, bool kCapped, bool kCertainty>
void forward(const TokenLogprobForward& args) {
  const LogitRows& rows = args.rows;
#pragma omp parallel for schedule(static) num_threads(args.executor)
  for (int64_t t = 0; t < rows.num_rows; ++t) {
    const float temperature = temperature_of(rows, t);
    float logprob = 0, entropy = 0, lse = 0, certainty = 0, num_finite = 0;
    if (is_active(rows, t) && !is_valid(rows, t, temperature)) {
      logprob = entropy = lse = certainty = NAN;
    } else if (is_active(rows, t)) {
      const T* row = static_cast<const T*>(rows.logits) + t * rows.stride;
      const RowStats stats = row_stats<T, kCapped, kCertainty>(row, rows.vocabulary, temperature, rows.softcap);
      const float log_exp = logf(stats.exp);
      const float z_target = logit_at(row, rows.targets[t], kCapped ? rows.softcap : 0.0f);
      logprob = (z_target - stats.top) / temperature - log_exp;
      entropy = log_exp - stats.exp_x / stats.exp;
      lse = stats.top / temperature + log_exp;
      certainty = log_exp - stats.finite_x / stats.num_finite;
      num_finite = stats.num_finite;
    }
    args.logprob[t] = logprob;
    args.entropy[t] = entropy;
    args.lse[t] = lse;
    if (kCertainty) {
      args.self_certainty[t] = certainty;
      args.num_finite[t] = num_finite;
    }
  }
}

RowGrad row_grad(const TokenLogprobBackward& args, int64_t t) {
  RowGrad grad = {};
  if (args.dlogprob && args.logprob[t] != -INFINITY) grad.onehot = args.dlogprob[t];
  if (args.dentropy) {
    grad.constant -= args.dentropy[t] * args.entropy[t];
    grad.slope = -args.dentropy[t];
  }
  if (args.dlse) grad.constant += args.dlse[t];
  if (args.dself_certainty) {
    grad.constant += args.dself_certainty[t];
    grad.uniform = args.dself_certainty[t] / (args.num_finite[t] > 1 ? args.num_finite[t] : 1.0f);
  }
  return grad;
}

template <typename T, bool kCapped>
void backward(const TokenLogprobBackward& args) {
  const LogitRows& rows = args.rows;
#pragma omp parallel for schedule(static) num_threads(args.executor)
  for (int64_t t = 0; t < rows.num_rows; ++t) {
    T* out = static_cast<T*>(args.dlogits) + t * args.dlogits_stride;
    if (!is_active(rows, t)) {
      zero_row(out, rows.vocabulary);
      continue;
    }
    const RowGrad grad = row_grad(args, t);
    if (grad.is_zero()) {
      zero_row(out, rows.vocabulary);
      continue;
    }
    const float temperature = temperature_of(rows, t);
    const bool valid = is_valid(rows, t, temperature);
    const T* row = static_cast<const T*>(rows.logits) + t * rows.stride;
    row_gradient<T, kCapped>(row, out, rows.vocabulary, valid ? rows.targets[t] : 0, temperature, rows.softcap,
                             valid ? args.lse[t] : NAN, args.logprob[t], grad);
  }
}

template <typename T>
void forward_as(const TokenLogprobForward& args) {
  const bool capped = args.rows.softcap > 0, certainty = args.self_certainty;
  if (capped && certainty) return forward<T, true, true>(args);
  if (capped) return forward<T, true, false>(args);
  if (certainty) return forward<T, false, true>(args);
  return forward<T, false, false>(args);
}

template <typename T>
void backward_as(const TokenLogprobBackward& args) {
  return args.rows.softcap > 0 ? backward<T, true>(args) : backward<T, false>(args);
}

}  // namespace

void token_logprob_fwd(const TokenLogprobForward& args) {
  switch (args.rows.dtype) {
    case Dtype::f32: return forward_as<float>(args);
    case Dtype::bf16: return forward_as<bf16>(args);
    case Dtype::f16: return forward_as<f16>(args);
  }
}

void token_logprob_bwd(const TokenLogprobBackward& args) {
  switch (args.rows.dtype) {
    case Dtype::f32: return backward_as<float>(args);
    case Dtype::bf16: return backward_as<bf16>(args);
    case Dtype::f16: return backward_as<f16>(args);
  }
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
