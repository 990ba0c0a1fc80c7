// Binds the executor into taskloom._native.
#pragma once

#include <pybind11/pybind11.h>

namespace taskloom {

void bind_merge(pybind11::module_& m);

}  // namespace taskloom
