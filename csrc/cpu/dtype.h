// Element types, by the codes that native.py passes.
#pragma once

#include <cstdint>

namespace mgrpo {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace mgrpo
