// The launchers of one instruction set.
#include "kernels.h"

namespace mgrpo {
namespace MGRPO_ISA {
bool linear_token_logprob_fwd(const LinearTokenLogprobForward&);
bool linear_token_logprob_bwd(const LinearTokenLogprobBackward&);
void ema_update(const EmaUpdate&);
void grpo_loss_fwd(const GrpoLossForward&);
void logits_grpo_loss_fwd(const LogitsGrpoLossForward&);
bool majority_vote_small(const MajorityVote&, int64_t prompt);
void token_logprob_fwd(const TokenLogprobForward&);
void token_logprob_bwd(const TokenLogprobBackward&);
}  // namespace MGRPO_ISA

extern const Kernels MGRPO_TABLE = {
    MGRPO_ISA::linear_token_logprob_fwd,
    MGRPO_ISA::linear_token_logprob_bwd,
    MGRPO_ISA::ema_update,
    MGRPO_ISA::grpo_loss_fwd,
    MGRPO_ISA::logits_grpo_loss_fwd,
    MGRPO_ISA::majority_vote_small,
    MGRPO_ISA::token_logprob_fwd,
    MGRPO_ISA::token_logprob_bwd,
};

}  // namespace mgrpo
