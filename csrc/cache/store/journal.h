// What the journals of a cache promise.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/format.h"

namespace kdfast::cache {

// A shard as its journal has it.
struct JournalShard {
    std::uint64_t writer = 0;
    std::uint32_t ordinal = 0;
    std::uint64_t shard_id = 0;
    std::uint64_t bytes = 0;    // committed
    std::uint64_t samples = 0;  // committed
    bool finished = false;      // `bytes` is then the whole file
    bool dropped = false;       // given up: not to be read
    struct Commit {
        std::uint64_t bytes, samples, time;
    };
    std::vector<Commit> commits;  // of rising bytes; the first says that the shard was opened

    std::uint64_t commit_time(std::uint64_t frame_end) const;  // of the commit that covers a frame
};

struct Journal {
    std::uint64_t writer = 0;
    bool closed = false;
    std::uint64_t whole = 0;  // bytes of its records but for a torn last one, which nobody was told of
    std::uint32_t records = 0;
    std::vector<JournalShard> shards;
    static Journal parse(Bytes bytes, std::uint64_t writer, Bytes cache_header);
};

inline std::uint32_t crc_of(Bytes cache_header) { return load<std::uint32_t>(cache_header, cache_header.size() - 4); }

}  // namespace kdfast::cache
