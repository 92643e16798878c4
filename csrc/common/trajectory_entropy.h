// Arguments of the entropy of trajectories. N sequences, T packed tokens, L padded length.
#pragma once

#include "dtype.h"

namespace mgrpo {

// Which tokens belong to each sequence: packed with cu_seqlens, else padded.
struct Trajectories {
  const int64_t* cu_seqlens;  // [N+1] or null
  const bool* mask;           // [N, L], null if packed or empty
  int64_t num_sequences;      // N
  int64_t num_tokens;         // T, or L
  bool mean;
  Executor executor;
};

// entropy [N] from tokens, [T] or [N, L] in dtype.
void launch_trajectory_entropy_fwd(const Trajectories&, const void* tokens, Dtype, float* entropy);
// dtokens, [T] or [N, L] in dtype, from dentropy [N].
void launch_trajectory_entropy_bwd(const Trajectories&, const float* dentropy, Dtype, void* dtokens);

}  // namespace mgrpo
