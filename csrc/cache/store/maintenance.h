// Looking after a cache: is all of it right, what can be saved of it, several into one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cache/fault.h"
#include "cache/store/catalog.h"
#include "cache/store/reader.h"

namespace kdfast::cache {

struct Verified {
    std::uint64_t samples = 0, tokens = 0, bytes = 0;  // looked at
    std::vector<Fault> faults;
};
// Every checksum and every value of every frame, and both copies of every model, on up to `threads` threads.
Verified verify(const std::string& directory, int threads);

// That the file at `path` is the whole of a catalogued, finished shard: length, headers, index, tail and the checksum
// of every block and of every model. Throws the first fault.
void check_shard(const Catalog& catalog, std::uint32_t shard, const std::string& path, int threads);

// What is wrong with the values of the samples in a catalogued shard, of which `path` is the file.
std::vector<Fault> verify_shard(const Reader& reader, std::uint32_t shard, const std::string& path, int threads);

struct Repaired {
    std::uint64_t kept = 0;           // samples copied to a shard of their own
    std::vector<Fault> lost;          // what could not be saved, and why
    std::vector<std::string> done;    // what was done, in words
    std::vector<std::string> in_use;  // journals whose writers are alive, left as they are
};
// Copies what is good of every damaged or unfinished shard to a new one and gives the old one up. A crash at any moment
// leaves a cache that can be repaired again.
Repaired repair(const std::string& directory);

struct Merged {
    std::uint64_t samples = 0, there_already = 0;
};
// The samples of caches at `paths`, byte for byte but verified, into one that is there or is made; once all indices are
// known to allow it. Of a key that several have, with equal token ids, the first stays; others must have its targets,
// unless `keep_duplicates`.
Merged merge(const std::vector<std::string>& paths, const std::string& destination, std::uint64_t shard_bytes,
             bool keep_duplicates);

}  // namespace kdfast::cache
