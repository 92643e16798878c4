// Arguments of the operations on rows of logits. Letters and pointers: see dtype.h.
#pragma once

#include "dtype.h"

namespace mgrpo {

// Rows of logits with targets, mask and scale; shared by the operations on logits.
struct LogitRows {
  const void* logits;         // [T, V] in dtype, rows `stride` elements apart
  Dtype dtype;
  int64_t num_rows;           // T
  int64_t vocabulary;         // V
  int64_t stride;
  const int64_t* targets;     // [T]; -100 masks the row
  const bool* mask;           // [T] or null
  const float* temperatures;  // [T] or null
  float temperature;          // where temperatures is null
  float softcap;              // 0 for none
};

struct TokenLogprobForward {
  LogitRows rows;
  float* logprob;         // [T]
  float* entropy;         // [T]
  float* lse;             // [T]
  float* self_certainty;  // [T] or null
  float* num_finite;      // [T] or null; with self_certainty
  Executor executor;
};

struct TokenLogprobBackward {
  LogitRows rows;
  const float* logprob;          // [T], of the forward
  const float* entropy;          // [T]
  const float* lse;              // [T]
  const float* num_finite;       // [T] or null
  const float* dlogprob;         // [T] or null
  const float* dentropy;         // [T] or null
  const float* dlse;             // [T] or null
  const float* dself_certainty;  // [T] or null
  void* dlogits;                 // [T, V] in dtype; may be the logits
  int64_t dlogits_stride;
  Executor executor;
};

void launch_token_logprob_fwd(const TokenLogprobForward&);
void launch_token_logprob_bwd(const TokenLogprobBackward&);

}  // namespace mgrpo
