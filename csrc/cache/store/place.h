// One frame of a sample, and where it stands.
#pragma once

#include <cstdint>
#include <string>

#include "cache/format.h"

namespace kdfast::cache {

struct Place {
    IndexEntry entry;
    std::uint32_t shard = 0;  // number in the directory
    std::string key;
};

}  // namespace kdfast::cache
