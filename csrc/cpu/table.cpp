// The launchers of one instruction set.
#include "kernels.h"

namespace mgrpo {
namespace MGRPO_ISA {
void token_logprob_fwd(const TokenLogprobForward&);
void token_logprob_bwd(const TokenLogprobBackward&);
}  // namespace MGRPO_ISA

extern const Kernels MGRPO_TABLE = {
    MGRPO_ISA::token_logprob_fwd,
    MGRPO_ISA::token_logprob_bwd,
};

}  // namespace mgrpo
