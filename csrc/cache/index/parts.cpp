#include "cache/index/parts.h"

#include <cstdio>
#include <cstring>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"

namespace kdfast::cache {
namespace {

constexpr std::uint32_t version = 1;
constexpr std::uint64_t most_generation = ~std::uint64_t{0} >> 1;
constexpr std::size_t page_id_at = IndexPage::rows_bytes, page_number_at = page_id_at + 8, page_rows_at = 4088;

void require(bool holds, const char* what) {
    if (!holds) corrupt(what);
}

// In words, of which a page is made: for every page that is read.
bool is_zero(const std::byte* from, const std::byte* to) {
    std::uint64_t any = 0;
    for (; from < to; from += 8) any |= load<std::uint64_t>(from);
    return any == 0;
}

}  // namespace

void append_rows(std::vector<IndexRow>& rows, const Index& index, std::uint32_t shard) {
    const std::size_t first = rows.size();
    std::vector<std::string_view> keys;
    std::size_t key_at = 0;
    for (const IndexEntry& entry : index.entries) {
        if (entry.kind == Kind::sample) {
            keys.push_back(std::string_view(index.keys).substr(key_at, entry.key_bytes));
            rows.push_back({{}, entry, shard});
        }
        key_at += entry.key_bytes;
    }
    std::vector<KeyHash> hashes(keys.size());
    key_hashes(keys, hashes);
    for (std::size_t i = 0; i < hashes.size(); ++i) rows[first + i].key = hashes[i];
}

void IndexPage::append_row(std::vector<std::byte>& out, const IndexRow& row) {
    append(out, row.key.high);
    append(out, row.key.low);
    row.entry.append_to(out);
    append(out, row.shard);
    append(out, std::uint32_t{0});
}

void IndexPage::finish(std::vector<std::byte>& out, std::size_t begin, std::uint64_t file_id, std::uint64_t number) {
    const std::size_t count = (out.size() - begin) / IndexRow::size;
    out.resize(begin + size);
    std::byte* page = out.data() + begin;
    store(page + page_id_at, file_id);
    store(page + page_number_at, number);
    store(page + page_rows_at, static_cast<std::uint32_t>(count));
    store(page + size - 4, crc32c(Bytes(page, size - 4)));
}

std::size_t IndexPage::check(Bytes page, std::uint64_t file_id, std::uint64_t number) {
    if (!has_crc(page.first(size - 4), load<std::uint32_t>(page, size - 4)))
        throw Fault(Code::checksum, "the checksum of a page of the index does not match");
    if (load<std::uint64_t>(page, page_id_at) != file_id || load<std::uint64_t>(page, page_number_at) != number)
        throw Fault(Code::mismatch, "a page of the index lies where it was not written");
    const auto count = load<std::uint32_t>(page, page_rows_at);
    require(count <= rows, "a page of the index has more rows than it can hold");
    require(is_zero(page.data() + count * IndexRow::size, page.data() + rows_bytes) &&
                is_zero(page.data() + page_number_at + 8, page.data() + page_rows_at),
            "padding of a page of the index is not zero");
    return count;
}

IndexRow IndexPage::row(Bytes page, std::size_t row) {
    const Bytes at = page.subspan(row * IndexRow::size, IndexRow::size);
    IndexRow found{key(page.data(), row), IndexEntry::parse(at.subspan(16)), load<std::uint32_t>(at, 64)};
    require(found.entry.kind == Kind::sample && load<std::uint32_t>(at, 68) == 0, "a row of the index is of no sample");
    return found;
}

void IndexedShard::append_to(std::vector<std::byte>& out) const {
    append(out, writer);
    append(out, shard_id);
    append(out, bytes);
    append(out, end);
    append(out, samples);
    append(out, tokens);
    append(out, ordinal);
    append(out, std::uint32_t{0});
}

IndexedShard IndexedShard::parse(Bytes bytes) {
    const IndexedShard shard{load<std::uint64_t>(bytes, 0),  load<std::uint64_t>(bytes, 8),
                             load<std::uint64_t>(bytes, 16), load<std::uint64_t>(bytes, 24),
                             load<std::uint64_t>(bytes, 32), load<std::uint64_t>(bytes, 40),
                             load<std::uint32_t>(bytes, 48)};
    require(load<std::uint32_t>(bytes, 52) == 0 && shard.shard_id != 0 && shard.bytes <= most_shard_bytes &&
                shard.end <= shard.bytes && shard.samples >= 1 && shard.samples <= shard.bytes &&
                shard.ordinal < most_shards,
            "a shard of the index is beyond its limits");
    return shard;
}

std::array<std::byte, IndexTail::size> IndexTail::bytes() const {
    std::array<std::byte, size> out{};
    std::memcpy(out.data(), "KDFPAGES", 8);
    store(&out[8], version);
    store(&out[12], header_crc);
    store(&out[16], id);
    store(&out[24], previous);
    store(&out[32], generation);
    store(&out[40], rows);
    store(&out[48], keys);
    store(&out[56], buckets);
    store(&out[64], pages);
    store(&out[72], shards);
    store(&out[76], shards_crc);
    store(&out[84], crc32c(Bytes(out).first(84)));
    return out;
}

IndexTail IndexTail::parse(Bytes bytes) {
    if (bytes.size() != size) throw Fault(Code::truncated, "the index ends too early");
    if (text_of(bytes.first(8)) != "KDFPAGES") corrupt("this is no index");
    if (const auto v = load<std::uint32_t>(bytes, 8); v != version)
        throw Fault(Code::version, "an index of version " + std::to_string(v) + ": this build reads version 1");
    if (!has_crc(bytes.first(84), load<std::uint32_t>(bytes, 84)))
        throw Fault(Code::checksum, "the checksum of the index's tail does not match");
    const IndexTail tail{.header_crc = load<std::uint32_t>(bytes, 12),
                         .id = load<std::uint64_t>(bytes, 16),
                         .previous = load<std::uint64_t>(bytes, 24),
                         .generation = load<std::uint64_t>(bytes, 32),
                         .rows = load<std::uint64_t>(bytes, 40),
                         .keys = load<std::uint64_t>(bytes, 48),
                         .buckets = load<std::uint64_t>(bytes, 56),
                         .pages = load<std::uint64_t>(bytes, 64),
                         .shards = load<std::uint32_t>(bytes, 72),
                         .shards_crc = load<std::uint32_t>(bytes, 76)};
    constexpr std::uint64_t most_pages = most_shard_bytes / IndexPage::size;
    require(load<std::uint32_t>(bytes, 80) == 0 && tail.id != 0 && tail.keys <= tail.rows && tail.buckets >= 1 &&
                tail.buckets <= tail.pages && tail.pages <= most_pages && tail.rows <= tail.pages * IndexPage::rows &&
                tail.shards >= 1 && tail.shards <= tail.rows && tail.generation <= most_generation,
            "the index's tail is beyond its limits");
    return tail;
}

std::string index_name(std::uint64_t id) {
    char name[32];
    std::snprintf(name, sizeof name, "%016llx.index", static_cast<unsigned long long>(id));
    return name;
}

std::optional<std::uint64_t> index_id(std::string_view name) {
    const auto id = id_of(name, ".index");
    return id && index_name(*id) == name ? id : std::nullopt;
}

}  // namespace kdfast::cache
