#include "cache/store/listing.h"

#include <algorithm>
#include <utility>

namespace kdfast::cache {

Listing::Listing(Directory& directory, bool all, std::vector<Fault>* damage) : keys_(directory.shards().size()) {
    for (CatalogShard& shard : directory.shards()) {
        if (shard.indexed && !all) continue;
        try {
            add(directory.number_of(shard), directory.read(shard, damage));
        } catch (Fault& fault) {
            fault.in(directory.path(shard));
            if (!damage || fault.code == Code::system) throw;
            damage->push_back(std::move(fault));
        }
    }
    resolve(directory);
}

void Listing::add(std::uint32_t shard, Index index) {
    keys_[shard] = std::move(index.keys);
    std::uint64_t key_at = 0;
    for (const IndexEntry& entry : index.entries) {
        if (entry.kind == Kind::sample) frames_.push_back({entry, key_at, shard});
        key_at += entry.key_bytes;
    }
}

void Listing::resolve(const Directory& directory) {
    by_key_.reserve(frames_.size());
    for (std::uint32_t i = 0; i < frames_.size(); ++i) {
        const auto [found, fresh] = by_key_.try_emplace(key(frames_[i]), i);
        if (fresh) continue;
        const Place before = place(frames_[found->second]), now = place(frames_[i]);
        if (std::optional<Fault> fault = directory.conflict(before, now))
            conflicts_.try_emplace(found->first, *std::move(fault));
        if (directory.is_before(now, before)) found->second = i;
    }
    counting_.reserve(by_key_.size());
    for (const auto& [key, frame] : by_key_) counting_.push_back(frame);
    std::sort(counting_.begin(), counting_.end());
}

const Listing::Frame* Listing::find(std::string_view key) const {
    const auto found = by_key_.find(key);
    return found == by_key_.end() ? nullptr : &frames_[found->second];
}

}  // namespace kdfast::cache
