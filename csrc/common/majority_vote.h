// Arguments of the majority vote. B prompts, G rollouts a prompt.
#pragma once

#include "dtype.h"

namespace mgrpo {

struct MajorityVote {
  const int64_t* answer_ids;  // [B, G]; negative for no answer
  const bool* keep;           // [B, G] or null
  const void* weights;        // [B, G] int32 or int64, or null
  bool wide_weights;          // int64
  const bool* tie_break;      // [B, G] or null
  int64_t num_prompts;        // B
  int64_t group;              // G
  int64_t* label;             // [B]
  float* share;               // [B]
  float* margin;              // [B]
  bool* tie;                  // [B]
  float* class_share;         // [B, G]
  int64_t* lowest;            // [2]: least id where one is below -1, and least weight where one is below 0; else >= these
  Executor executor;
};

void launch_majority_vote(const MajorityVote&);

}  // namespace mgrpo
