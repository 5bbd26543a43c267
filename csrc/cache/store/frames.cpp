#include "cache/store/frames.h"

#include <algorithm>

#include "cache/store/model_frame.h"

namespace kdfast::cache {

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

}  // namespace kdfast::cache
