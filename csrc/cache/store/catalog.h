// What a cache's directory holds: the header, what the journals promise, and the frames of every shard.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cache/fault.h"
#include "cache/format.h"
#include "cache/store/file.h"

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

// One frame, and where it stands.
struct Place {
    IndexEntry entry;
    std::uint64_t key_at = 0;  // in the keys of its shard
    std::uint32_t shard = 0;   // number in Catalog::shards
};

struct CatalogShard : JournalShard {
    std::string file;         // name in the directory
    std::uint64_t first = 0;  // where frames begin
    std::uint64_t end = 0;    // where they end
    std::uint64_t tokens = 0;
    std::string keys;                // of its frames, end to end
    std::vector<IndexEntry> models;  // every copy
};

// Reads header, journals and indices once. They are believed after their checksums; the frames are for who reads them.
class Catalog {
  public:
    // Damage that may hide keys is thrown, or, with `damage` given, appended there and left out. What the system
    // refuses is thrown.
    explicit Catalog(std::string directory, std::vector<Fault>* damage = nullptr);
    Catalog(const Catalog&) = delete;
    Catalog& operator=(const Catalog&) = delete;

    const std::string& directory() const { return directory_; }
    const CacheHeader& header() const { return header_; }
    const std::vector<std::byte>& header_bytes() const { return header_bytes_; }
    std::uint32_t header_crc() const { return crc_of(header_bytes_); }
    const std::vector<CatalogShard>& shards() const { return shards_; }
    std::string path(const CatalogShard& shard) const { return join(directory_, shard.file); }
    // Whether a repair has given a shard up, by its id.
    bool is_dropped(std::uint64_t shard_id) const { return dropped_.contains(shard_id); }

    std::size_t size() const { return keys_.size(); }
    // The keys in the order of shards and, within one, of frames.
    const Place& at(std::size_t i) const { return places_[keys_[i]]; }
    std::string_view key(const Place& place) const {
        return std::string_view(shards_[place.shard].keys).substr(place.key_at, place.entry.key_bytes);
    }
    // The frame that counts for a key, or null. Throws Fault where frames of the key differ or cannot be compared.
    const Place* find(std::string_view key) const;
    // Every frame, those that do not count too.
    const std::vector<Place>& places() const { return places_; }
    // Keys whose frames differ, and how, or cannot be compared, and why.
    const std::unordered_map<std::string_view, Fault>& conflicts() const { return conflicts_; }
    // The header of a place's frame, read from its shard's file and compared with what the index says.
    FrameHeader frame_header(const File& file, const Place& place) const;

  private:
    File open_shard(CatalogShard& shard) const;
    void read_shard(CatalogShard& shard, std::vector<Fault>* damage);
    void read_index(const File& file, CatalogShard& shard);
    void take(Index index, CatalogShard& shard);
    void resolve();
    bool same_content(const Place& a, const Place& b) const;

    std::string directory_;
    CacheHeader header_;
    std::vector<std::byte> header_bytes_;
    std::vector<CatalogShard> shards_;
    std::unordered_set<std::uint64_t> dropped_;
    std::vector<Place> places_;
    std::vector<std::uint32_t> keys_;  // the place that counts for each key
    std::unordered_map<std::string_view, std::uint32_t> by_key_;
    std::unordered_map<std::string_view, Fault> conflicts_;
};

// The header of the frame that lies where an entry says, in as many bytes as it says; the rest of it is not compared.
FrameHeader read_frame_header(const File& shard, const IndexEntry& entry, std::uint64_t shard_id);

// Frames in [first, end) of a shard, models among them, each as long as its header says. Behind one that is damaged,
// the next one that is not, if `damage` is given; otherwise that is thrown.
Index scan_frames(const File& shard, std::uint64_t shard_id, std::uint64_t first, std::uint64_t end,
                  std::vector<Fault>* damage);

// Throws Fault mismatch where what the journal says of a shard, whose frames begin at `first`, is not what its index
// does.
void check_commits(const Index& index, const JournalShard& shard, std::uint64_t first);

// The writer's id of a journal's name, or of a shard's.
std::optional<std::uint64_t> writer_of(std::string_view name, std::string_view suffix);

}  // namespace kdfast::cache
