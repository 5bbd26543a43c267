// The frames of some shards, in memory, by key.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cache/fault.h"
#include "cache/store/directory.h"

namespace kdfast::cache {

class Listing {
  public:
    // Of a directory's shards, but for those that its index has where `all` is false. Damage is treated as
    // Directory::read_journals does.
    Listing(Directory& directory, bool all, std::vector<Fault>* damage);
    Listing(const Listing&) = delete;
    Listing& operator=(const Listing&) = delete;

    struct Frame {
        IndexEntry entry;
        std::uint64_t key_at;  // in the keys of its shard
        std::uint32_t shard;
    };
    // Every frame, in the order of shards and, within one, of the file.
    const std::vector<Frame>& frames() const { return frames_; }
    std::string_view key(const Frame& frame) const {
        return std::string_view(keys_[frame.shard]).substr(frame.key_at, frame.entry.key_bytes);
    }
    Place place(const Frame& frame) const { return {frame.entry, frame.shard, std::string(key(frame))}; }
    // The frame that counts for each key, in the order of frames().
    std::size_t size() const { return counting_.size(); }
    const Frame& at(std::size_t i) const { return frames_[counting_[i]]; }
    // That of one key, or null.
    const Frame* find(std::string_view key) const;
    // Keys whose frames differ, and how, or cannot be compared, and why.
    const std::unordered_map<std::string_view, Fault>& conflicts() const { return conflicts_; }

  private:
    void add(std::uint32_t shard, Index index);
    void resolve(const Directory& directory);

    std::vector<std::string> keys_;  // of each shard, end to end
    std::vector<Frame> frames_;
    std::vector<std::uint32_t> counting_;
    std::unordered_map<std::string_view, std::uint32_t> by_key_;
    std::unordered_map<std::string_view, Fault> conflicts_;
};

}  // namespace kdfast::cache
