// The soft-target cache.
#pragma once

#include <pybind11/pybind11.h>

namespace kdfast::bindings {

void add_cache(pybind11::module_& m);
void add_packed(pybind11::module_& m);  // what leaves the cache packed, and its way into tensors

}  // namespace kdfast::bindings
