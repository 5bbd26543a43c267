// What a kernel may find wrong with the bytes of a block.
#pragma once

#include <cstdint>

namespace kdfast::cache {

enum class Broken : std::uint8_t { none, id, escapes, steps, words };

}  // namespace kdfast::cache
