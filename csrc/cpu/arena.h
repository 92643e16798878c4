// Temporaries of a call in one allocation, in huge pages.
#pragma once

#include <cstdint>
#include <cstdlib>

#include <sys/mman.h>

#include "simd.h"

namespace mgrpo {
namespace MGRPO_ISA {
namespace {

// Offsets into one allocation.
struct Layout {
  int64_t bytes = 0;

  int64_t add(int64_t size) {
    const int64_t at = bytes;
    bytes += blocks_of(size, 64) * 64;
    return at;
  }
};

// The huge pages inside a range of memory. Fresh memory costs a fault a page: in pages of 4 KiB, met at the first
// store, those of dweight took as long as two of the three products; in huge pages and ahead, a fifth of that.
class HugePages {
 public:
  static constexpr int64_t kBytes = 1 << 21;

  HugePages(const void* from, int64_t bytes)
      : first_((reinterpret_cast<uintptr_t>(from) + kBytes - 1) / kBytes),
        last_(most(first_, (reinterpret_cast<uintptr_t>(from) + uintptr_t(bytes)) / kBytes)) {}

  // Advice that the system does not know or cannot follow affects only speed.
  void ask() const {
#if defined(MADV_HUGEPAGE)
    const size_t bytes = size_t((last_ - first_) * kBytes);
    if (bytes) madvise(reinterpret_cast<void*>(first_ * kBytes), bytes, MADV_HUGEPAGE);
#endif
  }

  // Inside a parallel region: maps them and keeps their contents.
  void fault_in() const {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, of Linux 5.14
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t page = first_; page < last_; ++page)
      madvise(reinterpret_cast<void*>(page * kBytes), size_t(kBytes), kPopulateWrite);
#endif
  }

 private:
  int64_t first_, last_;
};

// All temporaries of a call.
class Arena {
 public:
  explicit Arena(int64_t bytes) {
    const int64_t alignment = bytes < HugePages::kBytes ? 64 : HugePages::kBytes;
    if (posix_memalign(&data_, size_t(alignment), size_t(most(bytes, 64)))) data_ = nullptr;
    HugePages(data_, data_ ? bytes : 0).ask();
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset);
  }

 private:
  void* data_ = nullptr;
};

}  // namespace
}  // namespace MGRPO_ISA
}  // namespace mgrpo
