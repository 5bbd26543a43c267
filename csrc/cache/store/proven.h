// Which blocks a reader need not prove again.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cache/format.h"

namespace kdfast::cache {

// What the entries of a block are to each other (rows/prove.h) costs as much to look at as to decode, and is as it was
// where the bytes are: their checksum, place and length say that, and are verified at every read. Remembers about a
// million blocks, those met last; a page of the table is memory once one of its blocks has been proven.
class Proven {
  public:
    Proven() : table_(static_cast<std::uint64_t*>(std::calloc(places, sizeof(std::uint64_t)))) {
        if (!table_) throw std::bad_alloc();
    }

    // A block, as it stands in its frame.
    static std::uint64_t name(const FrameHeader& header, std::uint64_t place, const BlockEntry& block) {
        std::uint64_t name = header.shard_id;
        const std::uint64_t format = std::uint64_t{header.kept} << 24 | std::uint64_t{header.grid} << 16 |
                                     std::uint64_t{header.flags} << 8 | static_cast<std::uint64_t>(header.codec);
        for (const std::uint64_t part : {place, std::uint64_t{block.crc} << 32 | block.bytes, format, header.model}) {
            name = (name ^ part) * 0x9E3779B97F4A7C15u;
            name ^= name >> 32;
        }
        return name == 0 ? 1 : name;
    }
    bool has(std::uint64_t name) const { return place_of(name).load(std::memory_order_relaxed) == name; }
    void add(std::uint64_t name) const { place_of(name).store(name, std::memory_order_relaxed); }

  private:
    static constexpr std::size_t places = std::size_t{1} << 20;
    struct Free {
        void operator()(std::uint64_t* table) const { std::free(table); }
    };
    std::atomic_ref<std::uint64_t> place_of(std::uint64_t name) const {
        return std::atomic_ref(table_.get()[name % places]);
    }

    std::unique_ptr<std::uint64_t, Free> table_;
};

}  // namespace kdfast::cache
