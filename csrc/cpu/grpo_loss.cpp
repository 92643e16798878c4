// Clipped policy-gradient loss, its metrics and its gradient from log-probs.
//
// Fused: every term and its derivative, the seven metrics and all reductions, in one read of each token tensor and one
// write of each gradient (an eager expression makes some forty passes). A ratio of the sequence reads the two log-probs
// once more, ahead of it.
#include "loss_terms.h"

namespace mgrpo {
namespace MGRPO_ISA {

void grpo_loss_fwd(const GrpoLossForward& args) {
  const LossContext context = loss_context(args.tokens, args.options, args.scratch, args.executor);
  loss_of_tokens(context, args.scratch, args.outputs, args.executor);
}

}  // namespace MGRPO_ISA
}  // namespace mgrpo
