#include "cache/store/catalog.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "cache/index/key_hash.h"

namespace kdfast::cache {
namespace {

using Order = std::vector<std::pair<KeyHash, std::uint32_t>>;

// Keys, by their numbers, in the order of the index: of those that lie in one page the next is read for nothing. They
// are as good as random, so that they are nearly in order once each is where its first bits say.
Order in_order(std::span<const std::string_view> keys) {
    std::vector<KeyHash> hashes(keys.size());
    key_hashes(keys, hashes);
    const int shift = 64 - std::clamp(static_cast<int>(std::bit_width(keys.size() / 8)), 1, 16);
    std::vector<std::uint32_t> next((std::size_t{1} << (64 - shift)) + 1);
    for (const KeyHash& hash : hashes) ++next[(hash.high >> shift) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    Order order(keys.size());
    for (std::uint32_t i = 0; i < hashes.size(); ++i) order[next[hashes[i].high >> shift]++] = {hashes[i], i};
    for (std::size_t bucket = 0, first = 0; bucket + 1 < next.size(); first = next[bucket++])
        std::sort(order.begin() + static_cast<std::ptrdiff_t>(first),
                  order.begin() + static_cast<std::ptrdiff_t>(next[bucket]));
    return order;
}

}  // namespace

Catalog::Catalog(std::string directory, std::vector<Fault>* damage, UseIndex use)
    : directory_(std::move(directory)), tolerant_(damage != nullptr) {
    // The index before the journals, so that they say of every shard of it what they ever will.
    if (use == UseIndex::yes) index_ = IndexChain(directory_.path(), directory_.header_crc());
    directory_.read_journals(damage);
    index_.join(directory_);
    listing_ = std::make_unique<const Listing>(directory_, false, damage);
    frames_ = index_.rows() + listing_->frames().size();
    size_ = index_.keys() + listing_->size();
    if (index_.empty()) return;
    try {
        std::vector<std::string_view> keys(listing_->size());
        for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = listing_->key(listing_->at(i));
        for (const auto& [hash, i] : in_order(keys))
            if (index_.has(hash)) --size_;
    } catch (const Fault& fault) {
        if (!is_dispensable(fault)) throw;
        size_ = whole().size();
    }
}

Catalog::~Catalog() { delete whole_.load(); }

// Reads what the index is of, as if there were none.
const Listing& Catalog::whole() const {
    if (const Listing* there = whole_.load(std::memory_order_acquire)) return *there;
    Directory again = directory_;
    std::vector<Fault> damage;
    auto mine = std::make_unique<const Listing>(again, true, tolerant_ ? &damage : nullptr);
    const Listing* none = nullptr;
    if (whole_.compare_exchange_strong(none, mine.get(), std::memory_order_acq_rel)) return *mine.release();
    return *none;  // another thread was first
}

// The frame that counts and, of others that differ from it, the fault.
std::optional<Place> Catalog::look_up(std::string_view key, std::optional<Fault>* conflict) const {
    std::optional<Place> counts;
    const auto take = [&](Place place) {
        if (!counts) {
            counts = std::move(place);
            return;
        }
        if (conflict && !*conflict) *conflict = directory_.conflict(*counts, place);
        if (directory_.is_before(place, *counts)) counts = std::move(place);
    };
    const auto take_listed = [&](const Listing& listing) {
        const Listing::Frame* frame = listing.find(key);
        if (!frame) return;
        if (const auto known = listing.conflicts().find(key); conflict && known != listing.conflicts().end())
            *conflict = known->second;
        take(listing.place(*frame));
    };
    if (!index_.empty() && !whole_.load(std::memory_order_acquire)) {
        try {
            index_.find(key_hash(key),
                        [&](const IndexEntry& entry, std::uint32_t shard) { take({entry, shard, std::string(key)}); });
        } catch (const Fault& fault) {
            if (!is_dispensable(fault)) throw;
            static_cast<void>(whole());
        }
    }
    if (const Listing* all = whole_.load(std::memory_order_acquire)) {
        counts.reset();
        if (conflict) conflict->reset();
        take_listed(*all);
    } else if (listing_->size() > 0) {
        take_listed(*listing_);
    }
    return counts;
}

std::optional<Place> Catalog::find(std::string_view key) const {
    std::optional<Fault> conflict;
    std::optional<Place> place = look_up(key, &conflict);
    if (conflict) throw conflict->in(directory()).of(std::string(key));
    return place;
}

std::optional<Place> Catalog::first(std::string_view key) const { return look_up(key, nullptr); }

std::vector<bool> Catalog::have(std::span<const std::string_view> keys) const {
    std::vector<bool> have(keys.size());
    const auto take_listed = [&](const Listing& listing) {
        for (std::size_t i = 0; i < keys.size(); ++i)
            if (!have[i]) have[i] = listing.find(keys[i]) != nullptr;
    };
    if (!index_.empty() && !whole_.load(std::memory_order_acquire)) {
        try {
            for (const auto& [hash, i] : in_order(keys)) have[i] = index_.has(hash);
        } catch (const Fault& fault) {
            if (!is_dispensable(fault)) throw;
            static_cast<void>(whole());
        }
    }
    const Listing* all = whole_.load(std::memory_order_acquire);
    if (all) have.assign(keys.size(), false);
    if (const Listing& listing = all ? *all : *listing_; listing.size() > 0) take_listed(listing);
    return have;
}

std::size_t Catalog::indexed_shards() const {
    if (whole_.load(std::memory_order_acquire)) return 0;  // it was given up
    return static_cast<std::size_t>(std::ranges::count(shards(), true, &CatalogShard::indexed));
}

// Whether a frame is the one that counts for its key.
bool Catalog::counts(std::string_view key, std::uint32_t shard, const IndexEntry& entry) const {
    if (frames_ == size_) return true;  // all do
    const std::optional<Place> place = first(key);
    return place && place->shard == shard && place->entry == entry;
}

std::optional<std::string> Catalog::Keys::next() {
    const Listing& listing = catalog_.listing();
    for (;;) {
        if (!moved_.empty()) {
            std::string key = std::move(moved_.back());
            moved_.pop_back();
            return key;
        }
        while (in_index_ && at_ < index_.entries.size()) {
            const IndexEntry& entry = index_.entries[at_++];
            std::string key = index_.keys.substr(key_at_, entry.key_bytes);
            key_at_ += entry.key_bytes;
            if (entry.kind == Kind::sample && catalog_.counts(key, shard_, entry)) return key;
        }
        in_index_ = false;
        // Frames of the listing are in the order of shards, too.
        while (listed_ < listing.size() && listing.at(listed_).shard < next_shard_) {
            const Listing::Frame& frame = listing.at(listed_++);
            std::string key(listing.key(frame));
            if (catalog_.counts(key, frame.shard, frame.entry)) return key;
        }
        if (!open_next()) return {};
    }
}

// The keys of a shard that is gone, and that a repair has copied to others since; throws what was met where none has.
std::vector<std::string> Catalog::moved(std::uint32_t shard, const Fault& gone) const {
    std::vector<Fault> damage;
    const Catalog now(directory(), &damage);
    if (!now.is_dropped(shards()[shard].shard_id)) throw Fault(gone);
    std::vector<std::string> keys;
    Keys all(now);
    while (std::optional<std::string> key = all.next()) {
        const std::optional<Place> place = first(*key);
        if (place && place->shard == shard) keys.push_back(*std::move(key));
    }
    std::ranges::reverse(keys);
    return keys;
}

// The next shard, of whose keys the listing has those that it has.
bool Catalog::Keys::open_next() {
    if (next_shard_ == catalog_.shards().size()) return false;
    shard_ = next_shard_++;
    if (!catalog_.shards()[shard_].indexed) return true;
    CatalogShard shard = catalog_.shards()[shard_];
    try {
        index_ = catalog_.directory_.read(shard, nullptr);
    } catch (Fault& fault) {
        fault.in(catalog_.path(shard));
        if (fault.code != Code::missing) throw;
        moved_ = catalog_.moved(shard_, fault);
        return true;
    }
    at_ = key_at_ = 0;
    in_index_ = true;
    return true;
}

}  // namespace kdfast::cache
