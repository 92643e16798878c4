// Arguments of the interquartile filter. B prompts, G rollouts a prompt.
#pragma once

#include "dtype.h"

namespace mgrpo {

// Quartiles over each of the scopes: one of all B * G entries, or B of G each.
struct IqrFilter {
  const float* entropy;  // [num_scopes, scope_size]
  const bool* keep;      // the same, or null
  int64_t num_scopes;
  int64_t scope_size;
  float k;
  bool two_sided;
  bool* kept;            // [num_scopes, scope_size]
  float* q1;             // [num_scopes]
  float* q3;             // [num_scopes]
  Executor executor;
};

void launch_iqr_filter(const IqrFilter&);

}  // namespace mgrpo
