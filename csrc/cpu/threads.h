// When a small operation is worth threads: a call of some 0.1 ms. Under load, waiting for a second thread can take a
// time slice of the system, far more than it saves in a shorter call.
#pragma once

#include <cstdint>

namespace mgrpo {

// Elements that are only read and added up: half a nanosecond each.
constexpr int64_t kLeastParallelReads = 262144;
// Elements that are compared and selected: 2 to 20 ns each.
constexpr int64_t kLeastParallelWork = 65536;

}  // namespace mgrpo
