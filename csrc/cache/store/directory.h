// A cache's directory as its header and journals have it: which shards there are, and how much of each counts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "cache/fault.h"
#include "cache/format.h"
#include "cache/store/file.h"
#include "cache/store/journal.h"
#include "cache/store/place.h"

namespace kdfast::cache {

struct CatalogShard : JournalShard {
    std::string file;         // name in the directory
    std::uint64_t first = 0;  // where frames begin
    std::uint64_t end = 0;    // where they end
    std::uint64_t tokens = 0;
    bool indexed = false;            // its samples are in the directory's index
    std::vector<IndexEntry> models;  // every copy; none where `indexed`
};

class Directory {
  public:
    explicit Directory(std::string path);  // reads the header
    // What a journal hides is thrown or, with `damage` given, appended there. What the system refuses is thrown.
    void read_journals(std::vector<Fault>* damage);

    const std::string& path() const { return path_; }
    const CacheHeader& header() const { return header_; }
    const std::vector<std::byte>& header_bytes() const { return header_bytes_; }
    std::uint32_t header_crc() const { return crc_of(header_bytes_); }
    const std::vector<CatalogShard>& shards() const { return shards_; }
    std::vector<CatalogShard>& shards() { return shards_; }
    std::uint32_t number_of(const CatalogShard& shard) const {
        return static_cast<std::uint32_t>(&shard - shards_.data());
    }
    std::string path(const CatalogShard& shard) const {
        return join(path_, shard.file.empty() ? shard_name(shard.writer, shard.ordinal, true) : shard.file);
    }
    // Whether a repair has given a shard up, by its id.
    bool is_dropped(std::uint64_t shard_id) const { return dropped_.contains(shard_id); }
    // Says of a finished shard what the directory's index knows.
    void set_indexed(std::uint32_t shard, std::uint64_t end, std::uint64_t tokens);

    // The frames of a shard, from its index or, where it has none, by their headers, believed after their checksums;
    // fills in what the journal does not say of it.
    Index read(CatalogShard& shard, std::vector<Fault>* damage) const;
    // The header of a place's frame, read from its shard's file and compared with what the index says.
    FrameHeader frame_header(const File& file, const Place& place) const;
    // Whether a frame counts before another of the same key.
    bool is_before(const Place& a, const Place& b) const;
    // What is wrong with two frames of one key: that they differ, or cannot be compared.
    std::optional<Fault> conflict(const Place& a, const Place& b) const;

  private:
    File open(CatalogShard& shard) const;
    Index read_index(const File& file, CatalogShard& shard) const;
    bool same_content(const Place& a, const Place& b) const;

    std::string path_;
    CacheHeader header_;
    std::vector<std::byte> header_bytes_;
    std::vector<CatalogShard> shards_;
    std::unordered_set<std::uint64_t> dropped_;
};

}  // namespace kdfast::cache
