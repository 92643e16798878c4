// Types of the launchers' arguments.
//
// Letters: T token rows, V vocabulary, D hidden, N sequences, B prompts, G rollouts a prompt. Pointers are to memory of
// the launcher's device that the caller owns and has checked; a null pointer stands for an absent argument.
#pragma once

#include <cstdint>

namespace mgrpo {

// Element types, by the codes that native.py passes.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// Where a launcher runs: a number of threads of a CPU, or the handle of a CUDA stream.
using Executor = int64_t;

}  // namespace mgrpo
