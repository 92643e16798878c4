// The module of CUDA devices. It links the runtime statically, so that it loads where there is no driver, and takes
// streams by their handles, which all runtimes of a process share.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include <cuda_runtime_api.h>

#include "../bindings.h"
#include "source_hashes.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of mgrpo_kernels.";
  m.def("architectures", [] { return MGRPO_CUDA_ARCHITECTURES; }, "The architectures it was compiled for.");
  m.def(
      "sources",
      [] {
        std::map<std::string, std::string> hashes;
        for (const auto& [name, hash] : kSourceHashes) hashes[name] = hash;
        return hashes;
      },
      "Hashes of the sources without comments, by file name.");
  m.def(
      "error",
      [] {
        int count = 0;
        const cudaError_t status = cudaGetDeviceCount(&count);
        return std::string(status == cudaSuccess ? "" : cudaGetErrorString(status));
      },
      "Why no kernel can run here; empty where one can.");
  bind_operations(m);
}
