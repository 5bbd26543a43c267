#include "cache/index/chain.h"

#include <algorithm>
#include <cerrno>
#include <unordered_map>
#include <utility>

#include "cache/fault.h"

namespace kdfast::cache {
namespace {

// A file of the index, or null where it is not what it should be; `gone` where it was there and is no longer.
std::unique_ptr<const IndexFile> open_part(const std::string& path, std::uint64_t id, std::uint32_t header_crc,
                                           std::vector<Fault>* damage, bool& gone) {
    try {
        if (is_file(path)) return std::make_unique<const IndexFile>(path, id, header_crc);
    } catch (const Fault& fault) {
        if (!is_dispensable(fault)) throw;
        gone = gone || fault.code == Code::missing;
        if (damage && fault.code != Code::missing) damage->push_back(fault);
    }
    return nullptr;
}

}  // namespace

bool is_dispensable(const Fault& fault) { return fault.code != Code::system || fault.number == ESTALE; }

IndexChain::IndexChain(const std::string& directory, std::uint32_t header_crc, std::vector<Fault>* damage) {
    // A writer that ends takes the place of some files by one, which may be between the list and the opening.
    constexpr int attempts = 3;
    for (int attempt = 1; attempt <= attempts; ++attempt) {
        bool gone = false;
        std::vector<Fault> found;
        read(directory, header_crc, found, gone);
        if (gone && attempt < attempts) continue;
        if (damage) damage->insert(damage->end(), found.begin(), found.end());
        return;
    }
}

void IndexChain::read(const std::string& directory, std::uint32_t header_crc, std::vector<Fault>& damage, bool& gone) {
    parts_.clear();
    generation_ = 0;
    std::unordered_map<std::uint64_t, std::unique_ptr<const IndexFile>> files;
    std::uint64_t next = 0;
    for (const std::string& name : list_directory(directory)) {
        const auto id = index_id(name);
        if (!id) continue;
        std::unique_ptr<const IndexFile> file = open_part(cache::join(directory, name), *id, header_crc, &damage, gone);
        if (!file) continue;
        const std::uint64_t generation = file->tail().generation;
        if (next == 0 || generation > generation_) next = *id;
        generation_ = std::max(generation_, generation);
        files.emplace(*id, std::move(file));
    }
    while (next != 0) {
        const auto found = files.find(next);
        if (found == files.end() || !found->second) {
            damage.push_back(Fault(Code::mismatch, "the index builds on a file that is not there, or on itself")
                                 .in(parts_.back().file->path()));
            return forget();
        }
        next = found->second->tail().previous;
        parts_.push_back({std::move(found->second), {}});
    }
}

void IndexChain::join(Directory& directory, std::vector<Fault>* damage) {
    std::unordered_map<std::uint64_t, std::uint32_t> numbers;  // of shards, by their ids
    for (const CatalogShard& shard : directory.shards()) numbers.emplace(shard.shard_id, directory.number_of(shard));
    std::vector<bool> met(directory.shards().size());
    const auto is_there = [&](const CatalogShard& shard, const IndexedShard& there) {
        return shard.finished && shard.writer == there.writer && shard.ordinal == there.ordinal &&
               shard.bytes == there.bytes && shard.samples == there.samples &&
               file_size(directory.path(shard)) == shard.bytes;
    };
    for (Part& part : parts_)
        for (const IndexedShard& there : part.file->shards()) {
            const auto found = numbers.find(there.shard_id);
            if (found == numbers.end() || !is_there(directory.shards()[found->second], there)) return forget();
            if (met[found->second]) {
                if (damage)
                    damage->push_back(Fault(Code::mismatch, "a shard is in the index twice").in(part.file->path()));
                return forget();
            }
            met[found->second] = true;
            part.shards.push_back(found->second);
        }
    for (const Part& part : parts_)
        for (std::size_t i = 0; i < part.shards.size(); ++i)
            directory.set_indexed(part.shards[i], part.file->shards()[i].end, part.file->shards()[i].tokens);
}

std::uint64_t IndexChain::keys() const {
    std::uint64_t sum = 0;
    for (const Part& part : parts_) sum += part.file->tail().keys;
    return sum;
}

std::uint64_t IndexChain::rows() const {
    std::uint64_t sum = 0;
    for (const Part& part : parts_) sum += part.file->tail().rows;
    return sum;
}

}  // namespace kdfast::cache
