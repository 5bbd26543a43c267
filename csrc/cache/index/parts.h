// The parts of an index file (FORMAT.md, section 9): each as a struct, to bytes and back.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache/bytes.h"
#include "cache/format.h"
#include "cache/index/key_hash.h"

namespace kdfast::cache {

// One frame of a sample.
struct IndexRow {
    static constexpr std::size_t size = 72;
    KeyHash key;
    IndexEntry entry;
    std::uint32_t shard = 0;  // number in the file's list of shards
};

// A row for each sample of a shard's index.
void append_rows(std::vector<IndexRow>& rows, const Index& index, std::uint32_t shard);

// A page: rows in the order of their keys, and what says that they are its own.
struct IndexPage {
    static constexpr std::size_t size = 4096;
    static constexpr std::size_t rows = 56;
    static constexpr std::size_t rows_bytes = rows * IndexRow::size;

    static void append_row(std::vector<std::byte>& out, const IndexRow& row);
    // Completes a page of the rows that were appended since `begin`.
    static void finish(std::vector<std::byte>& out, std::size_t begin, std::uint64_t file_id, std::uint64_t number);
    // How many rows a page has. Throws Fault where it is not the page that it should be.
    static std::size_t check(Bytes page, std::uint64_t file_id, std::uint64_t number);
    static KeyHash key(const std::byte* page, std::size_t row) {
        const std::byte* at = page + row * IndexRow::size;
        return {load<std::uint64_t>(at), load<std::uint64_t>(at + 8)};
    }
    static IndexRow row(Bytes page, std::size_t row);
};

// A shard whose samples a file has.
struct IndexedShard {
    static constexpr std::size_t size = 56;
    std::uint64_t writer = 0;
    std::uint64_t shard_id = 0;
    std::uint64_t bytes = 0;  // all of the file
    std::uint64_t end = 0;    // of its frames
    std::uint64_t samples = 0;
    std::uint64_t tokens = 0;
    std::uint32_t ordinal = 0;

    void append_to(std::vector<std::byte>& out) const;
    static IndexedShard parse(Bytes bytes);
};

struct IndexTail {
    static constexpr std::size_t size = 88;
    std::uint32_t header_crc = 0;  // of the cache
    std::uint64_t id = 0;
    std::uint64_t previous = 0;  // id of the next older file of the index; 0: none
    std::uint64_t generation = 0;
    std::uint64_t rows = 0;
    std::uint64_t keys = 0;     // that no older file has
    std::uint64_t buckets = 0;  // pages at which rows may begin
    std::uint64_t pages = 0;
    std::uint32_t shards = 0;
    std::uint32_t shards_crc = 0;

    std::uint64_t file_bytes() const { return pages * IndexPage::size + shards * IndexedShard::size + size; }
    std::array<std::byte, size> bytes() const;
    static IndexTail parse(Bytes bytes);
};

// Where the rows of a key begin, unless those before it have filled that page and more.
inline std::uint64_t bucket_of(const KeyHash& key, std::uint64_t buckets) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::uint64_t>(Wide{key.high} * buckets >> 64);
}

std::string index_name(std::uint64_t id);
std::optional<std::uint64_t> index_id(std::string_view name);

}  // namespace kdfast::cache
