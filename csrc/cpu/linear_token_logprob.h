// Sums over the vocabulary, and their gradients, from hidden states and the head's weight.
//
// Letters: T tokens, D hidden, V rows of the weight (the vocabulary, or this process's share of it).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mgrpo {

// Inputs of both directions. Logits are hidden . weight + bias; z = softcapped logits / temperature.
struct LinearHead {
  const void* hidden;  // [T, D] in dtype, rows hidden_stride elements apart
  const void* weight;  // [V, D] in dtype, rows weight_stride elements apart
  const float* bias;   // [V] or null
  Dtype dtype;
  int64_t num_tokens;   // T
  int64_t hidden_size;  // D
  int64_t vocabulary;   // V
  int64_t hidden_stride;
  int64_t weight_stride;
  const int64_t* targets;     // [T], row of `weight`; outside [0, V) another process holds it
  const float* temperatures;  // [T] or null
  float temperature;          // where temperatures is null
  float softcap;              // 0 for none
  // For all temporaries. Where it is less, a call takes up to a quarter more than its packed copies of `hidden` (one
  // forward, two backward) and its fp32 sums of dhidden.
  int64_t budget_bytes;
  int level;                  // of Selection
  int num_threads;
};

struct LinearTokenLogprobForward {
  LinearHead head;
  float* top;         // [T], largest z, at least -FLT_MAX
  float* exp;         // [T], sum of e^x, x = z - top; NaN where a logit is
  float* exp_x;       // [T], sum of e^x x
  float* finite_x;    // [T] or null, sum of x over the finite z
  float* num_finite;  // [T], with finite_x
  float* z_target;    // [T], 0 where another process holds the target
};

// With a = z - lse and p = e^a: dz = p (constant + slope a) + onehot at the target - uniform where z is finite.
struct LinearTokenLogprobBackward {
  LinearHead head;
  const float* lse;       // [T]
  const float* constant;  // [T]
  const float* slope;     // [T] or null
  const float* onehot;    // [T] or null
  const float* uniform;   // [T] or null
  void* dhidden;          // [T, D] in dhidden_dtype, or null
  Dtype dhidden_dtype;    // dtype, or f32
  int64_t dhidden_stride;
  void* dweight;  // [V, D] in dtype, or null
  int64_t dweight_stride;
  float* dbias;  // [V] or null
};

}  // namespace mgrpo
