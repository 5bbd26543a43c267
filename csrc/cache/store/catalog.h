// What a cache's directory holds: the header, what the journals promise, and the sample of every key, by the
// directory's index as far as that goes, and by the shards themselves where it does not.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/fault.h"
#include "cache/index/chain.h"
#include "cache/store/directory.h"
#include "cache/store/listing.h"

namespace kdfast::cache {

enum class UseIndex : bool { no, yes };

// Safe for many threads, and in a process forked from one that has it.
class Catalog {
  public:
    // Damage that may hide keys is thrown, or, with `damage` given, appended there and left out. What the system
    // refuses is thrown.
    explicit Catalog(std::string directory, std::vector<Fault>* damage = nullptr, UseIndex use = UseIndex::yes);
    ~Catalog();
    Catalog(const Catalog&) = delete;
    Catalog& operator=(const Catalog&) = delete;

    const std::string& directory() const { return directory_.path(); }
    const CacheHeader& header() const { return directory_.header(); }
    const std::vector<std::byte>& header_bytes() const { return directory_.header_bytes(); }
    std::uint32_t header_crc() const { return directory_.header_crc(); }
    const std::vector<CatalogShard>& shards() const { return directory_.shards(); }
    std::string path(const CatalogShard& shard) const { return directory_.path(shard); }
    bool is_dropped(std::uint64_t shard_id) const { return directory_.is_dropped(shard_id); }
    FrameHeader frame_header(const File& file, const Place& place) const {
        return directory_.frame_header(file, place);
    }

    // How many keys there are.
    std::uint64_t size() const { return size_; }
    // The frame that counts for a key. Throws Fault where frames of the key differ or cannot be compared.
    std::optional<Place> find(std::string_view key) const;
    // The same, of whatever others the key has.
    std::optional<Place> first(std::string_view key) const;
    // For each key whether there is a frame of it: quicker than to find them one by one.
    std::vector<bool> have(std::span<const std::string_view> keys) const;

    // The frames that are in memory: all of them without an index.
    const Listing& listing() const { return *listing_; }
    // Shards whose samples the directory's index has.
    std::size_t indexed_shards() const;

    // Keys, one shard's after the other's, in the order of their frames; a key whose frame does not count is left out.
    class Keys {
      public:
        explicit Keys(const Catalog& catalog) : catalog_(catalog) {}
        std::optional<std::string> next();  // nothing behind the last

      private:
        bool open_next();
        const Catalog& catalog_;
        std::uint32_t next_shard_ = 0;
        std::uint32_t shard_ = 0;
        Index index_;         // of an indexed shard
        std::size_t at_ = 0;  // in it
        std::size_t key_at_ = 0;
        std::size_t listed_ = 0;  // of the listing, so far
        bool in_index_ = false;
        std::vector<std::string> moved_;  // of a shard that a repair has given up, from the last one on
    };

  private:
    std::optional<Place> look_up(std::string_view key, std::optional<Fault>* conflict) const;
    bool counts(std::string_view key, std::uint32_t shard, const IndexEntry& entry) const;
    const Listing& whole() const;
    std::vector<std::string> moved(std::uint32_t shard, const Fault& gone) const;

    Directory directory_;
    IndexChain index_;
    const bool tolerant_;  // of damage
    std::unique_ptr<const Listing> listing_;
    std::uint64_t size_ = 0;
    std::uint64_t frames_ = 0;
    mutable std::atomic<const Listing*> whole_ = nullptr;  // of every shard, once a page of the index was damaged
};

}  // namespace kdfast::cache
