#include "cache/store/catalog.h"

#include <algorithm>
#include <tuple>

#include "cache/fault.h"
#include "cache/store/model_frame.h"

namespace kdfast::cache {

std::optional<std::uint64_t> writer_of(std::string_view name, std::string_view suffix) {
    if (!name.ends_with(suffix) || name.size() < 16 + suffix.size()) return {};
    std::uint64_t writer = 0;
    for (const char c : name.substr(0, 16)) {
        const bool digit = c >= '0' && c <= '9', letter = c >= 'a' && c <= 'f';
        if (!digit && !letter) return {};
        writer = writer << 4 | static_cast<std::uint64_t>(digit ? c - '0' : c - 'a' + 10);
    }
    return writer;
}

std::uint64_t JournalShard::commit_time(std::uint64_t frame_end) const {
    const auto covers = std::lower_bound(commits.begin(), commits.end(), frame_end,
                                         [](const Commit& c, std::uint64_t end) { return c.bytes < end; });
    return covers == commits.end() ? ~std::uint64_t{0} : covers->time;
}

Journal Journal::parse(Bytes bytes, std::uint64_t writer, Bytes cache_header) {
    Journal journal;
    journal.writer = writer;
    std::uint32_t number = 0;
    std::uint64_t total = 0;
    for (std::size_t at = 0; at < bytes.size(); at += Record::size, ++number) {
        const std::size_t left = bytes.size() - at;
        const bool torn = left < Record::size || (left == Record::size && bytes.back() == std::byte{0});
        if (torn) break;
        Record r;
        try {
            r = Record::parse(bytes.subspan(at, Record::size));
        } catch (Fault& fault) {
            throw fault.at(at);
        }
        const auto require = [&](bool holds, const char* what) {
            if (!holds) throw Fault(Code::corrupt, what).at(at);
        };
        const auto agree = [&](bool holds, const char* what) {
            if (!holds) throw Fault(Code::mismatch, what).at(at);
        };
        require(r.number == number, "a journal record is missing or repeated");
        require((r.type == RecordType::begin) == (number == 0), "a journal does not begin as it should");
        require(!journal.closed || r.type == RecordType::drop, "a journal goes on after its end");
        agree(r.writer == writer, "a journal record is of another writer");
        JournalShard* shard = journal.shards.empty() ? nullptr : &journal.shards.back();
        switch (r.type) {
            case RecordType::begin:
                require(r.ordinal == 0 && r.bytes == 0 && r.samples == 0, "a journal's first record says too much");
                agree(r.shard_id == crc_of(cache_header), "the journal belongs to a cache with another header");
                break;
            case RecordType::open:
                require(!shard || shard->finished || shard->dropped, "a shard was opened before the last was finished");
                require(
                    r.ordinal == journal.shards.size() && r.ordinal < most_shards && r.shard_id != 0 && r.samples == 0,
                    "a shard was opened out of order");
                agree(r.bytes == cache_header.size() + ShardHeader::size, "a shard does not begin with its headers");
                journal.shards.push_back({.writer = writer,
                                          .ordinal = r.ordinal,
                                          .shard_id = r.shard_id,
                                          .bytes = r.bytes,
                                          .samples = 0,
                                          .finished = false,
                                          .commits = {{r.bytes, 0, r.time}}});
                break;
            case RecordType::commit:
            case RecordType::finish:
                require(shard && !shard->finished && !shard->dropped && r.ordinal == shard->ordinal &&
                            r.shard_id == shard->shard_id,
                        "a commit to a shard that is not open");
                require(r.bytes >= shard->bytes && r.samples >= shard->samples, "a commit goes backwards");
                total += r.samples - shard->samples;
                shard->bytes = r.bytes;
                shard->samples = r.samples;
                shard->finished = r.type == RecordType::finish;
                shard->commits.push_back({r.bytes, r.samples, r.time});
                break;
            case RecordType::close:
                require(r.ordinal == 0 && r.shard_id == 0 && r.bytes == 0 && r.samples == total,
                        "a journal's last record does not add up");
                require(!shard || shard->finished || shard->dropped, "a writer closed before its shard was finished");
                journal.closed = true;
                break;
            case RecordType::drop:
                require(r.ordinal < journal.shards.size() && r.bytes == 0 && r.samples == 0, "a drop of no shard");
                shard = &journal.shards[r.ordinal];
                require(shard->shard_id == r.shard_id && !shard->dropped, "a drop of another shard");
                shard->dropped = true;
                break;
        }
        journal.whole = at + Record::size;
        journal.records = number + 1;
    }
    return journal;
}

FrameHeader read_frame_header(const File& shard, const IndexEntry& entry, std::uint64_t shard_id) {
    thread_local std::vector<std::byte> buffer;  // once for a thread: readers come here for every range
    const auto read = [&](std::uint64_t length) {
        buffer.resize(length);
        shard.read_at(entry.offset, buffer);
    };
    try {
        read(std::min(std::max<std::uint64_t>(entry.header_bytes, FrameLengths::size), entry.frame_bytes));
        const FrameLengths lengths = FrameLengths::parse(buffer);
        if (lengths.frame_bytes > entry.frame_bytes) throw Fault(Code::truncated, "a frame ends too early");
        if (lengths.header_bytes != buffer.size()) read(lengths.header_bytes);
        FrameHeader header = FrameHeader::parse(buffer);
        if (header.offset != entry.offset || header.shard_id != shard_id)
            throw Fault(Code::mismatch, "a frame lies where it was not written");
        return header;
    } catch (Fault& fault) {
        throw fault.in(shard.path()).at(entry.offset);
    }
}

namespace {

// What is in the directory of a cache; says so where it is none.
std::vector<std::string> list_cache(const std::string& directory) {
    std::vector<std::string> names;
    try {
        names = list_directory(directory);
    } catch (const Fault& fault) {
        if (fault.code != Code::missing) throw;
        throw Fault(Code::missing, "no cache is there: there is no such directory").in(directory);
    }
    if (std::ranges::find(names, "cache.header") != names.end()) return names;
    const bool shards = std::ranges::any_of(
        names, [](const std::string& name) { return name.ends_with(".shard") || name.ends_with(".open"); });
    throw Fault(Code::missing, shards ? "the cache has lost its cache.header, which a repair makes anew from a shard"
                                      : "no cache is there: the directory has no cache.header")
        .in(directory);
}

}  // namespace

Catalog::Catalog(std::string directory, std::vector<Fault>* damage) : directory_(std::move(directory)) {
    const std::vector<std::string> names = list_cache(directory_);
    const std::string header_path = join(directory_, "cache.header");
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
    const auto tolerate = [&](Fault fault) {
        if (!damage || fault.code == Code::system) throw fault;  // what cannot be read now is not damaged, and not gone
        damage->push_back(std::move(fault));
    };
    for (const std::string& name : names) {
        const auto writer = writer_of(name, ".journal");
        if (!writer || journal_name(*writer) != name) continue;
        try {
            const File file = File::read(join(directory_, name));
            const Journal journal = Journal::parse(file.bytes_at(0, file.size()), *writer, header_bytes_);
            for (const JournalShard& shard : journal.shards) {
                if (shard.dropped)
                    dropped_.insert(shard.shard_id);
                else
                    shards_.push_back({shard, {}, 0, 0, 0, {}, {}});
            }
        } catch (Fault& fault) {
            tolerate(fault.in(join(directory_, name)));
        }
    }
    for (CatalogShard& shard : shards_) {
        try {
            read_shard(shard, damage);
        } catch (Fault& fault) {
            shard.keys.clear();
            shard.models.clear();
            std::erase_if(places_, [&](const Place& p) { return &shards_[p.shard] == &shard; });
            tolerate(fault.in(path(shard)));
        }
    }
    resolve();
}

// Under its finished name or, unless it has to be finished, its first one; its writer may rename it meanwhile.
File Catalog::open_shard(CatalogShard& shard) const {
    shard.file = shard_name(shard.writer, shard.ordinal, true);
    if (shard.finished || exists(path(shard))) return File::read(path(shard));
    const std::string first_name = shard_name(shard.writer, shard.ordinal, false);
    if (!exists(join(directory_, first_name))) return File::read(path(shard));
    try {
        File file = File::read(join(directory_, first_name));
        shard.file = first_name;
        return file;
    } catch (const Fault& fault) {
        if (fault.code != Code::missing) throw;
        return File::read(path(shard));
    }
}

void Catalog::read_shard(CatalogShard& shard, std::vector<Fault>* damage) {
    const File file = open_shard(shard);
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
    const std::size_t before = places_.size();
    if (shard.finished) {
        if (size != shard.bytes) corrupt("something follows the shard's end");
        read_index(file, shard);
    } else {
        shard.end = shard.bytes;
        Index index = scan_frames(file, shard.shard_id, shard.first, shard.end, damage);
        if (!damage) check_commits(index, shard, shard.first);
        take(std::move(index), shard);
    }
    for (std::size_t i = before; i < places_.size(); ++i) shard.tokens += places_[i].entry.tokens;
}

// Each ends with a frame, but for a finish, which ends with the file, and counts the samples before its end.
void check_commits(const Index& index, const JournalShard& shard, std::uint64_t first) {
    std::uint64_t samples = 0, end = first;
    auto next = index.entries.begin();
    for (const JournalShard::Commit& commit : shard.commits) {
        for (; next != index.entries.end() && next->offset + next->frame_bytes <= commit.bytes; ++next) {
            end = next->offset + next->frame_bytes;
            samples += next->kind == Kind::sample;
        }
        const bool finish = shard.finished && &commit == &shard.commits.back();
        if ((end != commit.bytes && !finish) || samples != commit.samples)
            throw Fault(Code::mismatch, "the shard has " + std::to_string(samples) + " samples in " +
                                            std::to_string(end) + " bytes, " + std::to_string(commit.samples) + " in " +
                                            std::to_string(commit.bytes) + " were committed");
    }
}

void Catalog::read_index(const File& file, CatalogShard& shard) {
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
    take(std::move(index), shard);
}

void Catalog::take(Index index, CatalogShard& shard) {
    shard.keys = std::move(index.keys);
    std::uint64_t key_at = 0;
    for (const IndexEntry& entry : index.entries) {
        if (entry.kind == Kind::sample)
            places_.push_back({entry, key_at, static_cast<std::uint32_t>(&shard - shards_.data())});
        else
            shard.models.push_back(entry);
        key_at += entry.key_bytes;
    }
}

Index scan_frames(const File& shard, std::uint64_t shard_id, std::uint64_t first, std::uint64_t end,
                  std::vector<Fault>* damage) {
    Index index;
    const auto take_frame_at = [&](std::uint64_t offset) {
        const std::uint64_t left = end - offset;
        const std::vector<std::byte> head = shard.bytes_at(offset, std::min<std::uint64_t>(left, FrameLengths::size));
        if (is_model_frame(head)) {
            const IndexEntry entry = read_model_header(shard, shard_id, offset, end).entry();
            index.add(entry, {});
            return entry.frame_bytes;
        }
        const FrameLengths lengths = FrameLengths::parse(head);
        if (lengths.frame_bytes > left) throw Fault(Code::truncated, "a frame is longer than what was committed");
        IndexEntry entry;
        entry.offset = offset;
        entry.frame_bytes = lengths.frame_bytes;
        entry.header_bytes = lengths.header_bytes;
        const FrameHeader header = read_frame_header(shard, entry, shard_id);
        index.add(header.entry(), header.key);
        return header.frame_bytes();
    };
    bool lost = false;  // where the next frame begins, and looking for it
    for (std::uint64_t at = first; at < end && (!lost || end - at >= FrameLengths::size);) {
        try {
            at += take_frame_at(at);
            lost = false;
        } catch (Fault& fault) {
            if (fault.code == Code::system) throw;
            if (!damage) throw fault.in(shard.path()).at(at);
            if (!lost) damage->push_back(fault.in(shard.path()).at(at));
            lost = true;
            at += 8;
        }
    }
    return index;
}

FrameHeader Catalog::frame_header(const File& file, const Place& place) const {
    FrameHeader h = read_frame_header(file, place.entry, shards_[place.shard].shard_id);
    if (h.key != key(place) || h.entry() != place.entry)
        throw Fault(Code::mismatch, "a frame is not what the index says").in(file.path()).at(place.entry.offset);
    return h;
}

// Where none is hashed their headers tell, in which the checksums of the blocks stand.
bool Catalog::same_content(const Place& a, const Place& b) const {
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

void Catalog::resolve() {
    by_key_.reserve(places_.size());
    const auto order = [&](const Place& p) {
        const CatalogShard& s = shards_[p.shard];
        return std::tuple(s.commit_time(p.entry.offset + p.entry.frame_bytes), s.writer, s.ordinal, p.entry.offset);
    };
    for (std::uint32_t i = 0; i < places_.size(); ++i) {
        const auto [found, fresh] = by_key_.try_emplace(key(places_[i]), i);
        if (fresh) continue;
        const Place& other = places_[found->second];
        try {
            if (!same_content(other, places_[i]))
                conflicts_.try_emplace(
                    found->first,
                    Fault(Code::duplicate, "the key was written twice, with different token ids or contents: " +
                                               path(shards_[other.shard]) + " and " + path(shards_[places_[i].shard])));
        } catch (const Fault& fault) {
            if (fault.code == Code::system) throw;
            conflicts_.try_emplace(found->first, fault);
        }
        if (order(places_[i]) < order(other)) found->second = i;
    }
    keys_.reserve(by_key_.size());
    for (const auto& [key, place] : by_key_) keys_.push_back(place);
    std::sort(keys_.begin(), keys_.end());
}

const Place* Catalog::find(std::string_view key) const {
    if (const auto conflict = conflicts_.find(key); conflict != conflicts_.end())
        throw Fault(conflict->second).in(directory_).of(std::string(key));
    const auto found = by_key_.find(key);
    return found == by_key_.end() ? nullptr : &places_[found->second];
}

}  // namespace kdfast::cache
