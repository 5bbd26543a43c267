#include "cache/index/check.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "cache/index/chain.h"
#include "cache/store/directory.h"

namespace kdfast::cache {
namespace {

// What a file should hold, in any order; nothing where a shard of it is damaged, which others tell of.
std::optional<std::vector<IndexRow>> expected_rows(const IndexChain::Part& part, Directory& directory) {
    std::vector<IndexRow> rows;
    for (std::uint32_t i = 0; i < part.shards.size(); ++i) {
        Index index;
        CatalogShard& shard = directory.shards()[part.shards[i]];
        try {
            index = directory.read(shard, nullptr);
        } catch (const Fault& fault) {
            if (fault.code == Code::system) throw;
            return {};
        }
        const IndexedShard& there = part.file->shards()[i];
        if (there.end != shard.end || there.tokens != shard.tokens)
            throw Fault(Code::mismatch, "the index is not what its shards say").in(part.file->path());
        append_rows(rows, index, i);
    }
    return rows;
}

// The rows of one file against its shards, which say where each frame is, and whose key is there.
void check_file(const IndexChain::Part& part, Directory& directory, const IndexChain& older) {
    std::optional<std::vector<IndexRow>> rows = expected_rows(part, directory);
    if (!rows) return;
    std::vector<IndexRow>& expected = *rows;
    const auto order = [](const IndexRow& row) { return std::tuple(row.key, row.shard, row.entry.offset); };
    std::ranges::sort(expected, {}, order);
    std::vector<IndexRow> found;
    found.reserve(expected.size());
    part.file->for_each([&](const IndexRow& row) { found.push_back(row); });
    std::ranges::sort(found, {}, order);
    std::uint64_t keys = 0;
    std::optional<KeyHash> last;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const IndexRow& row = expected[i];
        if (order(found[i]) != order(row) || found[i].entry != row.entry)
            throw Fault(Code::mismatch, "the index is not what its shards say").in(part.file->path());
        if (last != row.key && !older.has(row.key)) ++keys;
        last = row.key;
        if (!part.file->has(row.key))
            throw Fault(Code::corrupt, "a row of the index lies where nobody looks for it").in(part.file->path());
    }
    if (keys != part.file->tail().keys)
        throw Fault(Code::mismatch, "the index has not as many keys as it says").in(part.file->path());
}

}  // namespace

std::vector<Fault> check_index(const std::string& path) {
    std::vector<Fault> faults;
    Directory directory(path);
    IndexChain chain(path, directory.header_crc(), &faults);
    std::vector<Fault> damage;  // which others tell of
    directory.read_journals(&damage);
    chain.join(directory, &faults);
    std::vector<IndexChain::Part>& parts = chain.parts();
    while (!parts.empty()) {
        const IndexChain::Part part = std::move(parts.front());
        parts.erase(parts.begin());
        try {
            check_file(part, directory, chain);
        } catch (const Fault& fault) {
            if (fault.code == Code::system) throw;
            faults.push_back(fault);
        }
    }
    return faults;
}

}  // namespace kdfast::cache
