#include "cache/index/chain.h"

#include <algorithm>
#include <cerrno>
#include <optional>
#include <unordered_map>

#include "cache/fault.h"

namespace kdfast::cache {
namespace {

// A file of the index, or null where it is not what it should be.
std::unique_ptr<const IndexFile> open_part(const std::string& directory, std::uint64_t id, std::uint32_t header_crc,
                                           std::vector<Fault>* damage) {
    try {
        return std::make_unique<const IndexFile>(join(directory, index_name(id)), id, header_crc);
    } catch (const Fault& fault) {
        if (!is_dispensable(fault)) throw;
        if (damage && fault.code != Code::missing) damage->push_back(fault);
        return nullptr;
    }
}

}  // namespace

bool is_dispensable(const Fault& fault) { return fault.code != Code::system || fault.number == ESTALE; }

IndexChain::IndexChain(const std::string& directory, std::uint32_t header_crc, std::vector<Fault>* damage) {
    // A writer that ends takes the place of some files by one, which may be between the list and the opening.
    for (int attempt = 0; attempt < 3 && parts_.empty(); ++attempt) {
        std::unordered_map<std::uint64_t, std::unique_ptr<const IndexFile>> files;
        std::uint64_t next = 0;
        for (const std::string& name : list_directory(directory)) {
            const auto id = index_id(name);
            if (!id) continue;
            std::unique_ptr<const IndexFile> file =
                open_part(directory, *id, header_crc, attempt == 0 ? damage : nullptr);
            if (!file) continue;
            const std::uint64_t generation = file->tail().generation;
            if (next == 0 || generation > generation_) next = *id;
            generation_ = std::max(generation_, generation);
            files.emplace(*id, std::move(file));
        }
        if (next == 0) return;
        while (next != 0) {
            const auto found = files.find(next);
            if (found == files.end() || !found->second) {  // gone, damaged, or met before
                parts_.clear();
                break;
            }
            next = found->second->tail().previous;
            parts_.push_back({std::move(found->second), {}});
        }
    }
}

void IndexChain::join(Directory& directory) {
    std::unordered_map<std::uint64_t, std::uint32_t> numbers;  // of shards, by their ids
    for (const CatalogShard& shard : directory.shards()) numbers.emplace(shard.shard_id, directory.number_of(shard));
    const auto number_of = [&](const IndexedShard& there) -> std::optional<std::uint32_t> {
        const auto found = numbers.find(there.shard_id);
        if (found == numbers.end()) return {};
        const CatalogShard& shard = directory.shards()[found->second];
        const bool same = shard.finished && shard.writer == there.writer && shard.ordinal == there.ordinal &&
                          shard.bytes == there.bytes && shard.samples == there.samples &&
                          file_size(directory.path(shard)) == shard.bytes;
        if (!same) return {};
        const std::uint32_t number = found->second;
        numbers.erase(found);  // two files cannot have it
        return number;
    };
    for (Part& part : parts_)
        for (const IndexedShard& shard : part.file->shards()) {
            const auto number = number_of(shard);
            if (!number) return parts_.clear();
            part.shards.push_back(*number);
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
