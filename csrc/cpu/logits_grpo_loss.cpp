// Clipped policy-gradient loss from rows of logits, with their gradient.
//
// Fused: the statistics of a row, its token's loss and the gradient of the row, while the row is still in the cache:
// the logits [T, V] are read from memory once and dlogits written once. Rows outside the mask are never read.
#include "loss_terms.h"
#include "token_row.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

// Elements that a thread takes at a time; masked rows cost nothing, so equal shares of rows are not equal work.
constexpr int64_t kGrabElements = 65536;

template <typename T>
void forward(const LogitsGrpoLossForward& args) {
  const LogitRows& rows = args.rows;
  const int64_t vocabulary = rows.vocabulary;
  const LossContext context = loss_context(args.tokens, args.options, args.scratch, args.executor);
  const LossOutputs gradients = {nullptr, nullptr, args.outputs.dlogprob, args.outputs.dentropy};
  const int grab = static_cast<int>(vocabulary < kGrabElements ? kGrabElements / vocabulary : 1);
#pragma omp parallel for schedule(dynamic, grab) num_threads(args.executor)
  for (int64_t t = 0; t < rows.num_rows; ++t) {
    const T* row = static_cast<const T*>(rows.logits) + t * rows.stride;
    T* out = args.dlogits ? static_cast<T*>(args.dlogits) + t * vocabulary : nullptr;
    const float temperature = rows.temperatures ? rows.temperatures[t] : rows.temperature;
    float logprob = 0, entropy = 0, lse = 0;
    int64_t target = rows.targets[t];
    if (args.tokens.mask[t]) {
      if (target < 0 || target >= vocabulary || !(temperature > 0 && temperature < INFINITY)) {
        target = 0;
        logprob = entropy = lse = NAN;
      } else {
        const RowStats stats = row_stats<T, false, false>(row, vocabulary, temperature, 0.0f);
        const float log_exp = logf(stats.exp);
        logprob = (logit_at(row, target, 0.0f) - stats.top) / temperature - log_exp;
        entropy = log_exp - stats.exp_x / stats.exp;
        lse = stats.top / temperature + log_exp;
      }
    }
    args.logprob[t] = logprob;
    args.entropy[t] = entropy;
    args.lse[t] = lse;
    if (!gradients.dlogprob) continue;
    loss_run(context, t, 1, nullptr, gradients);
    if (!out) continue;
    RowGrad grad = {};
    grad.onehot = gradients.dlogprob[t];
    if (gradients.dentropy) {
      grad.constant = -gradients.dentropy[t] * entropy;
      grad.slope = -gradients.dentropy[t];
    }
    if (lse == lse && grad.is_zero())
      zero_row(out, vocabulary);
    else
      row_gradient<T, false>(row, out, vocabulary, target, temperature, 0.0f, lse, logprob, grad);
  }
  const LossOutputs sums = {args.outputs.loss, args.outputs.metrics, nullptr, nullptr};
  loss_of_tokens(context, args.scratch, sums, args.executor);
}

}  // namespace

void logits_grpo_loss_fwd(const LogitsGrpoLossForward& args) {
  switch (args.rows.dtype) {
    case Dtype::f32: return forward<float>(args);
    case Dtype::bf16: return forward<bf16>(args);
    case Dtype::f16: return forward<f16>(args);
  }
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
