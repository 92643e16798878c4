// Code shared by the modules of all devices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace mgrpo {

using Address = std::uintptr_t;
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace mgrpo

void bind_operations(pybind11::module_&);
