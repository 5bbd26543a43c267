#include "cache/store/journal.h"

#include <algorithm>

#include "cache/fault.h"

namespace kdfast::cache {

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

}  // namespace kdfast::cache
