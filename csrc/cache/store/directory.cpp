#include "cache/store/directory.h"

#include <algorithm>
#include <tuple>

#include "cache/store/frames.h"

namespace kdfast::cache {
namespace {

// Says so where a directory is no cache.
void require_cache(const std::string& directory) {
    std::vector<std::string> names;
    try {
        names = list_directory(directory);
    } catch (const Fault& fault) {
        if (fault.code != Code::missing) throw;
        throw Fault(Code::missing, "no cache is there: there is no such directory").in(directory);
    }
    if (std::ranges::find(names, "cache.header") != names.end()) return;
    const bool shards = std::ranges::any_of(
        names, [](const std::string& name) { return name.ends_with(".shard") || name.ends_with(".open"); });
    throw Fault(Code::missing, shards ? "the cache has lost its cache.header, which a repair makes anew from a shard"
                                      : "no cache is there: the directory has no cache.header")
        .in(directory);
}

}  // namespace

Directory::Directory(std::string path) : path_(std::move(path)) {
    require_cache(path_);
    const std::string header_path = join(path_, "cache.header");
    try {
        const File file = File::read(header_path);
        const std::uint64_t size = file.size();
        if (size > most_cache_header) corrupt("the cache header's length is impossible");
        header_bytes_ = file.bytes_at(0, size);
        std::size_t length = 0;
        header_ = CacheHeader::parse(header_bytes_, &length);
        if (length != size) corrupt("something follows the cache header");
    } catch (Fault& fault) {
        throw fault.in(header_path);
    }
}

void Directory::read_journals(std::vector<Fault>* damage) {
    const auto tolerate = [&](Fault fault) {
        if (!damage || fault.code == Code::system) throw fault;  // what cannot be read now is not damaged, and not gone
        damage->push_back(std::move(fault));
    };
    for (const std::string& name : list_directory(path_)) {
        const auto writer = id_of(name, ".journal");
        if (!writer || journal_name(*writer) != name) continue;
        try {
            const File file = File::read(join(path_, name));
            const Journal journal = Journal::parse(file.bytes_at(0, file.size()), *writer, header_bytes_);
            for (const JournalShard& shard : journal.shards) {
                if (shard.dropped)
                    dropped_.insert(shard.shard_id);
                else
                    shards_.push_back({shard, {}, 0, 0, 0, false, {}});
            }
        } catch (Fault& fault) {
            tolerate(fault.in(join(path_, name)));
        }
    }
}

void Directory::set_indexed(std::uint32_t number, std::uint64_t end, std::uint64_t tokens) {
    CatalogShard& shard = shards_[number];
    shard.file = shard_name(shard.writer, shard.ordinal, true);
    shard.first = header_bytes_.size() + ShardHeader::size;
    shard.end = end;
    shard.tokens = tokens;
    shard.indexed = true;
}

// Under its finished name or, unless it has to be finished, its first one; its writer may rename it meanwhile.
File Directory::open(CatalogShard& shard) const {
    shard.file = shard_name(shard.writer, shard.ordinal, true);
    if (shard.finished || exists(path(shard))) return File::read(path(shard));
    const std::string first_name = shard_name(shard.writer, shard.ordinal, false);
    if (!exists(join(path_, first_name))) return File::read(path(shard));
    try {
        File file = File::read(join(path_, first_name));
        shard.file = first_name;
        return file;
    } catch (const Fault& fault) {
        if (fault.code != Code::missing) throw;
        return File::read(path(shard));
    }
}

Index Directory::read(CatalogShard& shard, std::vector<Fault>* damage) const {
    const File file = open(shard);
    const std::uint64_t size = file.size();
    if (size < shard.bytes)
        throw Fault(Code::truncated, "the shard has " + std::to_string(size) + " bytes, " +
                                         std::to_string(shard.bytes) + " were committed");
    shard.first = header_bytes_.size() + ShardHeader::size;
    const std::vector<std::byte> head = file.bytes_at(0, shard.first);
    if (!std::ranges::equal(Bytes(head).first(header_bytes_.size()), header_bytes_)) {
        // Which says what is wrong where it is not another one.
        static_cast<void>(CacheHeader::parse(file.bytes_at(0, std::min<std::uint64_t>(size, most_cache_header))));
        throw Fault(Code::mismatch, "the shard's cache header is not that of the cache");
    }
    const ShardHeader header = ShardHeader::parse(Bytes(head).subspan(header_bytes_.size()));
    if (header.shard_id != shard.shard_id || header.writer != shard.writer || header.ordinal != shard.ordinal)
        throw Fault(Code::mismatch, "the shard is not the one that its name and journal say");
    Index index;
    if (shard.finished) {
        if (size != shard.bytes) corrupt("something follows the shard's end");
        index = read_index(file, shard);
    } else {
        shard.end = shard.bytes;
        index = scan_frames(file, shard.shard_id, shard.first, shard.end, damage);
        if (!damage) check_commits(index, shard, shard.first);
    }
    shard.tokens = 0;
    shard.models.clear();
    for (const IndexEntry& entry : index.entries) {
        shard.tokens += entry.tokens;
        if (entry.kind == Kind::model) shard.models.push_back(entry);
    }
    return index;
}

Index Directory::read_index(const File& file, CatalogShard& shard) const {
    if (shard.bytes < shard.first + Tail::size) throw Fault(Code::truncated, "the shard has no room for its tail");
    const std::uint64_t tail_at = shard.bytes - Tail::size;
    const Tail tail = Tail::parse(file.bytes_at(tail_at, Tail::size));
    if (tail.shard_id != shard.shard_id) throw Fault(Code::mismatch, "the shard's tail is of another shard");
    if (tail.index_offset < shard.first || tail.index_offset > tail_at ||
        tail.index_bytes != tail_at - tail.index_offset)
        corrupt("the shard's index is not where it should be");
    shard.end = tail.index_offset;
    Index index =
        Index::parse(file.bytes_at(tail.index_offset, tail.index_bytes), shard.shard_id, shard.first, shard.end);
    check_commits(index, shard, shard.first);
    return index;
}

FrameHeader Directory::frame_header(const File& file, const Place& place) const {
    FrameHeader h = read_frame_header(file, place.entry, shards_[place.shard].shard_id);
    if (h.key != place.key || h.entry() != place.entry)
        throw Fault(Code::mismatch, "a frame is not what the index says").in(file.path()).at(place.entry.offset);
    return h;
}

// Where none is hashed their headers tell, in which the checksums of the blocks stand.
bool Directory::same_content(const Place& a, const Place& b) const {
    const bool hashed = (a.entry.flags & b.entry.flags & flag::hashed) != 0;
    if (hashed) return a.entry.token_hash == b.entry.token_hash;
    if ((a.entry.flags | b.entry.flags) & flag::hashed) return false;
    const auto comparable = [&](const Place& p) {
        FrameHeader h = frame_header(File::read(path(shards_[p.shard])), p);
        h.offset = h.shard_id = 0;
        return h.bytes();
    };
    return comparable(a) == comparable(b);
}

std::optional<Fault> Directory::conflict(const Place& a, const Place& b) const {
    try {
        if (same_content(a, b)) return {};
    } catch (const Fault& fault) {
        if (fault.code == Code::system) throw;
        return fault;
    }
    return Fault(Code::duplicate, "the key was written twice, with different token ids or contents: " +
                                      path(shards_[a.shard]) + " and " + path(shards_[b.shard]));
}

bool Directory::is_before(const Place& a, const Place& b) const {
    const auto order = [&](const Place& p) {
        const CatalogShard& s = shards_[p.shard];
        return std::tuple(s.commit_time(p.entry.offset + p.entry.frame_bytes), s.writer, s.ordinal, p.entry.offset);
    };
    return order(a) < order(b);
}

}  // namespace kdfast::cache
