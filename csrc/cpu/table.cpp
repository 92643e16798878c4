// The kernels of one instruction set.
#include "kernels.h"

namespace mgrpo {
namespace MGRPO_ISA {
#define MGRPO_KERNEL(name, Arguments) void name(const Arguments&);
#define MGRPO_ATTEMPT(name, ...) bool name(__VA_ARGS__);
#include "kernels.def"
}  // namespace MGRPO_ISA

extern const Kernels MGRPO_TABLE = {
#define MGRPO_KERNEL(name, Arguments) MGRPO_ISA::name,
#define MGRPO_ATTEMPT(name, ...) MGRPO_ISA::name,
#include "kernels.def"
};

}  // namespace mgrpo
