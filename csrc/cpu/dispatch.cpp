// Choice of the instruction set: once by CPUID, or forced by MGRPO_CPU_ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(MGRPO_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mgrpo {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(MGRPO_X86)

bool may_use_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  // Tile registers are off until a process asks for them (ARCH_REQ_XCOMP_PERM of XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

int widest_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C)) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (!avx512) return 1;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & (1u << 5))) return 2;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 3;
  const bool amx = (edx & (1u << 22)) && (edx & (1u << 24));
  return amx && may_use_amx() ? 4 : 3;
}

const Kernels* table(int level) { return level == 0 ? &kPortable : level == 1 ? &kAvx2 : &kAvx512; }

#else

int widest_level() { return 0; }
const Kernels* table(int) { return &kPortable; }

#endif

Selection select() {
  const int widest = widest_level();
  int level = widest;
  if (const char* wanted = std::getenv("MGRPO_CPU_ISA")) {
    level = 0;
    while (level < 5 && std::strcmp(wanted, kNames[level]) != 0) ++level;
    if (level > widest) {
      throw std::invalid_argument(std::string("mgrpo_kernels: MGRPO_CPU_ISA must be one of portable to ") +
                                  kNames[widest] + " on this processor, got " + wanted + ". Unset it.");
    }
  }
  return {table(level), level, kNames[level]};
}

}  // namespace

const Selection& selection() {
  static const Selection chosen = select();
  return chosen;
}

}  // namespace mgrpo
