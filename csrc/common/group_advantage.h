// Arguments of the advantage within a group. B prompts, G rollouts a prompt.
#pragma once

#include "dtype.h"

namespace mgrpo {

enum class AdvantageMode : int { std = 0, mean = 1, leave_one_out = 2, sign = 3 };

struct GroupAdvantage {
  const float* rewards;  // [B, G]
  const bool* keep;      // [B, G] or null
  int64_t num_prompts;   // B
  int64_t group;         // G
  AdvantageMode mode;
  float* advantage;      // [B, G]
  Executor executor;
};

void launch_group_advantage(const GroupAdvantage&);

}  // namespace mgrpo
