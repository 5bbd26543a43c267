// The one exception of the core: an argument that cannot be meant. The bindings turn it into Python's ValueError.
#pragma once

#include <stdexcept>

namespace kdfast {

struct ArgumentError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

}  // namespace kdfast
