// Whether a directory's index says what its shards do.
#pragma once

#include <string>
#include <vector>

#include "cache/fault.h"

namespace kdfast::cache {

// What is wrong with the index, against the indices of the shards that it is of. One that is of an older state is not
// used, and nothing of it is wrong.
std::vector<Fault> check_index(const std::string& directory);

}  // namespace kdfast::cache
