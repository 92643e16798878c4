// Launchers whose kernels exist once for each instruction set.
#include "kernels.h"

namespace mgrpo {

#define MGRPO_KERNEL(name, Arguments) \
  void launch_##name(const Arguments& args) { selection().kernels->name(args); }
#include "kernels.def"

}  // namespace mgrpo
