// Launchers whose kernels exist once for each instruction set.
#include "kernels.h"

namespace mgrpo {

void launch_ema_update(const EmaUpdate& args) { selection().kernels->ema_update(args); }
void launch_grpo_loss_fwd(const GrpoLossForward& args) { selection().kernels->grpo_loss_fwd(args); }
void launch_logits_grpo_loss_fwd(const LogitsGrpoLossForward& args) { selection().kernels->logits_grpo_loss_fwd(args); }
void launch_token_logprob_fwd(const TokenLogprobForward& args) { selection().kernels->token_logprob_fwd(args); }
void launch_token_logprob_bwd(const TokenLogprobBackward& args) { selection().kernels->token_logprob_bwd(args); }

}  // namespace mgrpo
