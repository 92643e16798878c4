// What bindings.cpp may call: one table of launchers per instruction set, chosen at run time.
//
// Letters: T token rows, V vocabulary, D hidden, N sequences, B prompts, G rollouts a prompt. Pointers are to host
// memory that the caller owns and has checked; a null pointer stands for an absent argument.
#pragma once

#include "token_logprob.h"

namespace mgrpo {

// Vector code, one function of each per instruction set; scalar code is declared in its own header.
struct Kernels {
  void (*token_logprob_fwd)(const TokenLogprobForward&);
  void (*token_logprob_bwd)(const TokenLogprobBackward&);
};

extern const Kernels kPortable;
#if defined(MGRPO_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The table in use: the widest that this processor runs, or the one that MGRPO_CPU_ISA names.
struct Selection {
  const Kernels* kernels;
  int level;         // 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx
  const char* name;  // of the level
};
const Selection& selection();

}  // namespace mgrpo
