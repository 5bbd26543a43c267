// The parts of a cache's files but for the blocks, as FORMAT.md has them: each as a struct, to bytes and back.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache/bytes.h"
#include "cache/codec.h"

namespace kdfast::cache {

// Section 1, "Limits".
inline constexpr std::uint32_t most_vocab_size = 1u << 24;
inline constexpr std::size_t most_temperatures = 16;
inline constexpr std::size_t most_metadata = (1u << 20) - 1024;
inline constexpr std::size_t most_key_bytes = 4096;
inline constexpr std::uint32_t most_tokens = 1u << 20;
inline constexpr std::uint32_t most_kept = 65535;
inline constexpr std::uint64_t most_entries = std::uint64_t{1} << 28;  // tokens x kept of a frame
inline constexpr std::uint64_t most_shard_bytes = std::uint64_t{1} << 48;
inline constexpr std::uint32_t least_grid = 2, most_grid = 10;
inline constexpr std::uint32_t most_shards = 1000000;  // of a writer
// No code of an entry takes more than 20 bytes, nor what a token has besides more than 128.
constexpr std::uint64_t most_block_bytes(std::uint32_t tokens, std::uint16_t kept) {
    return 256 + std::uint64_t{tokens} * (128 + 20 * std::uint64_t{kept});
}
constexpr bool is_block_tokens(std::uint32_t n) { return n == 64 || n == 128 || n == 256; }

// Section 3.
struct CacheHeader {
    std::uint32_t vocab_size = 0;
    std::uint8_t shift = 1;
    std::vector<double> temperatures;  // captured, ascending
    std::string metadata;              // a JSON object

    // Throws ArgumentError for values beyond the limits.
    std::vector<std::byte> bytes() const;
    // All of `bytes`, or its beginning where more follows; `size` says how much was it.
    static CacheHeader parse(Bytes bytes, std::size_t* size = nullptr);
    std::vector<double> stored_temperatures() const;  // those other than 1, which have an lse
};
// A cache header is no longer than this.
inline constexpr std::size_t most_cache_header = 32 + 8 * most_temperatures + most_metadata + 8;

// Section 4.
struct ShardHeader {
    static constexpr std::size_t size = 32;
    std::uint64_t shard_id = 0;
    std::uint64_t writer = 0;
    std::uint32_t ordinal = 0;

    std::array<std::byte, size> bytes() const;
    static ShardHeader parse(Bytes bytes);
};

using TokenHash = std::array<std::byte, 16>;

namespace flag {
inline constexpr std::uint8_t ragged = 1, gold = 2, hashed = 4, seeded = 8, all = 15;
}

enum class Kind : std::uint8_t { sample = 1, model = 2 };

struct IndexEntry {
    static constexpr std::size_t size = 48;
    std::uint64_t offset = 0;
    std::uint64_t frame_bytes = 0;
    TokenHash token_hash{};
    std::uint32_t header_bytes = 0;
    std::uint32_t tokens = 0;
    std::uint16_t kept = 0;
    std::uint16_t key_bytes = 0;
    Kind kind = Kind::sample;
    std::uint8_t flags = 0;
    Method method = Method::topk;
    Codec codec = Codec::fixed;

    bool operator==(const IndexEntry&) const = default;
    void append_to(std::vector<std::byte>& out) const;
    // Of a sample or of a model, within the limits; of where it lies only that the frame holds its header.
    static IndexEntry parse(Bytes bytes);
};

struct Index {
    std::vector<IndexEntry> entries;  // in the order of the shard
    std::string keys;                 // end to end, in the same order

    void add(const IndexEntry& entry, std::string_view key);
    std::vector<std::byte> bytes(std::uint64_t shard_id) const;
    // `first` is where frames begin and `end` where the index does: the frames must tile what is between.
    static Index parse(Bytes bytes, std::uint64_t shard_id, std::uint64_t first, std::uint64_t end);
};

struct Tail {
    static constexpr std::size_t size = 32;
    std::uint64_t shard_id = 0;
    std::uint64_t index_offset = 0;
    std::uint64_t index_bytes = 0;

    std::array<std::byte, size> bytes() const;
    static Tail parse(Bytes bytes);
};

// Section 5.
struct BlockEntry {
    std::uint32_t bytes = 0;
    std::uint32_t crc = 0;
};

struct FrameHeader {
    static constexpr std::size_t fixed_bytes = 88;
    static constexpr std::size_t least_bytes = fixed_bytes + 8 + 8;  // a key of up to 8 bytes, no block
    static constexpr std::size_t most_bytes = fixed_bytes + most_key_bytes + 8 * (most_tokens / 64) + 8;

    std::string key;
    std::uint64_t offset = 0;
    std::uint64_t shard_id = 0;
    std::uint64_t seed = 0;
    double parameter = 0;
    TokenHash token_hash{};
    std::uint32_t tokens = 0;
    std::uint16_t kept = 0;
    std::uint16_t block_tokens = 128;
    Codec codec = Codec::fixed;
    Method method = Method::topk;
    std::uint8_t grid = 4;
    std::uint8_t flags = 0;
    std::uint64_t model = 0;
    std::vector<BlockEntry> blocks;

    std::size_t header_bytes() const { return fixed_bytes + align8(key.size()) + 8 * blocks.size() + 8; }
    std::uint64_t frame_bytes() const;
    std::uint32_t tokens_of(std::size_t block) const;
    Layout layout(const CacheHeader& cache) const;
    IndexEntry entry() const;
    std::vector<std::byte> bytes() const;
    static FrameHeader parse(Bytes bytes);  // exactly the header
};

// The lengths at the beginning of a frame, before its checksum has been seen; throws where no header can have them.
struct FrameLengths {
    static constexpr std::size_t size = 16;
    std::uint32_t header_bytes = 0;
    std::uint64_t frame_bytes = 0;
    static FrameLengths parse(Bytes bytes);
};

// Section 7.
enum class RecordType : std::uint32_t { begin = 1, open, commit, finish, close, drop };

struct Record {
    static constexpr std::size_t size = 64;
    RecordType type = RecordType::begin;
    std::uint64_t writer = 0;
    std::uint32_t number = 0;
    std::uint32_t ordinal = 0;
    std::uint64_t shard_id = 0;  // of begin: the CRC of the cache header
    std::uint64_t bytes = 0;
    std::uint64_t samples = 0;
    std::uint64_t time = 0;  // ns since 1970

    std::array<std::byte, size> to_bytes() const;
    static Record parse(Bytes bytes);
};

// Throws ArgumentError for a key that the format cannot hold.
void check_key(std::string_view key);

// Section 2.
// The id that a file's name begins with, where it ends with `suffix`.
std::optional<std::uint64_t> id_of(std::string_view name, std::string_view suffix);
std::string journal_name(std::uint64_t writer);
std::string shard_name(std::uint64_t writer, std::uint32_t ordinal, bool finished);

}  // namespace kdfast::cache
