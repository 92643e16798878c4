// Arguments of the moving average of weights. Pointers: see dtype.h.
#pragma once

#include "dtype.h"

namespace mgrpo {

// One momentum tensor and its other tensors; all contiguous and of `count` elements.
struct EmaTensor {
  void* momentum;        // in momentum_dtype
  const void* policy;    // in policy_dtype
  void* compensation;    // bf16, or null; only with a bf16 momentum
  void* publish;         // in publish_dtype, or null
  int64_t count;
  int64_t first_group;   // groups of kEmaGroup elements in the tensors before this one
  uint64_t offset;       // of its first element in the whole tensor whose random bits it takes
  Dtype momentum_dtype;
  Dtype policy_dtype;
  Dtype publish_dtype;
};

// Every tensor starts a new group, so that random bits never straddle two spans of work.
constexpr int64_t kEmaGroup = 64;

struct EmaUpdate {
  const EmaTensor* tensors;
  int64_t num_tensors;
  int64_t num_groups;    // of all tensors
  double weight;         // share of the policy, or NaN
  const double* decay;   // [1]: in place of weight, 1 - decay where that is in [0, 1], else NaN; or null
  bool stochastic;       // of bf16 momentum
  bool has_offsets;      // whether any is not 0
  uint64_t seed;
  uint32_t step;
  const int64_t* step_at;  // [1], in place of step; or null
  Executor executor;
};

void launch_ema_update(const EmaUpdate&);

}  // namespace mgrpo
