// The one table of instruction sets: which kernels this machine runs, and which were asked for.
#pragma once

#include <span>
#include <string_view>

#include "cpu/dense.h"

namespace kdfast::cpu {

struct Isa {
    std::string_view name;
    bool (*supported)();
    const Kernels* kernels;
};

// Best first.
std::span<const Isa> isa_table();

// The kernels of the environment's KDFAST_FORCE_ISA, or the best that this machine supports. Read on every call, so
// that a test can go through the table. Throws ArgumentError for a name that is unknown or not supported here.
const Kernels& kernels();

}  // namespace kdfast::cpu
