// Functions for bindings.cpp: one table of launchers per instruction set, chosen at run time.
//
// Letters and pointers: see dtype.h.
#pragma once

#include "ema_update.h"
#include "grpo_loss.h"
#include "linear_token_logprob.h"
#include "majority_vote.h"
#include "token_logprob.h"

namespace mgrpo {

// Vector code, one function of each per instruction set; scalar code is declared in its own header.
struct Kernels {
#define MGRPO_KERNEL(name, Arguments) void (*name)(const Arguments&);
#define MGRPO_ATTEMPT(name, ...) bool (*name)(__VA_ARGS__);
#include "kernels.def"
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
