// Brings the index of a directory up to date.
#pragma once

#include <cstddef>
#include <string>

namespace kdfast::cache {

// What making an index may take.
struct IndexLimits {
    std::size_t rows_in_memory = std::size_t{1} << 18;  // that are sorted at a time, but those of a shard together
    std::size_t files_at_once = 32;                     // that are merged
};

// Adds the samples of finished shards that the index has not, in a file of their own, into which those of its files go
// that are no larger than a few times that: so every sample is written again as often as the logarithm of their number
// says. An index that cannot be used is made anew. Whoever calls this is alone in doing so, if the system has locks;
// otherwise what one of two has done is lost, and found again by the next.
//
// Throws Fault for journals or shards that are damaged, which is for a repair, and where the system refuses.
void update_index(const std::string& directory, IndexLimits limits = {});

}  // namespace kdfast::cache
