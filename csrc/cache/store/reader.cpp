#include "cache/store/reader.h"

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"
#include "cache/rows/prove.h"
#include "cache/store/scratch.h"
#include "core/error.h"
#include "core/threads.h"

namespace kdfast::cache {

// A block of a frame, and which of its tokens are asked for.
struct Reader::Part {
    const Layout& layout;
    Bytes block;  // followed by padding_after_block bytes
    std::int64_t tokens;
    std::int64_t first, count;
    std::int64_t row;     // of the first, among all that are asked for
    std::uint64_t place;  // in the shard
    std::uint64_t name;   // for Proven

    DecodeRequest whole(const Destination& out) const { return {block, tokens, 0, out}; }
    bool is_whole() const { return count == tokens; }
};

Reader::Reader(const std::string& directory, std::vector<Fault>* damage, std::size_t open_files, UseIndex use)
    : catalog_(directory, damage, use),
      files_(open_files),
      models_(catalog_.shards().size(), catalog_.header().vocab_size, catalog_.header().stored_temperatures().size()) {}

Reader::~Reader() { delete successor_.load(); }

const Reader& Reader::successor() const {
    if (const Reader* there = successor_.load(std::memory_order_acquire)) return *there;
    std::vector<Fault> damage;
    auto mine = std::make_unique<const Reader>(catalog_.directory(), &damage, files_.most());
    const Reader* none = nullptr;
    if (successor_.compare_exchange_strong(none, mine.get(), std::memory_order_acq_rel)) return *mine.release();
    return *none;  // another thread was first
}

template <class Use>
void Reader::with_file(const Place& place, Use use) const {
    const CatalogShard& shard = catalog_.shards()[place.shard];
    const auto open = [&] {
        try {
            return File::read(catalog_.path(shard));
        } catch (const Fault& fault) {
            if (fault.code != Code::missing || shard.finished) throw;  // its writer may have finished it since
            return File::read(join(catalog_.directory(), shard_name(shard.writer, shard.ordinal, true)));
        }
    };
    std::optional<OpenFiles::Handle> handle;
    try {
        handle.emplace(files_.get(place.shard, open));
    } catch (Fault& fault) {
        if (fault.code != Code::missing) throw;
        const Reader& now = successor();
        return now.with_file(now.place_of(catalog_, place, fault), use);
    }
    use(*this, **handle, place);
}

// Where a sample is now whose shard was found to be gone, for `fault`, since an earlier reader's catalogue was made. A
// repair has copied what was good of it, and says so in the shard's journal; without that it is another cache's sample,
// or another sample's. (In the same shard still, the next reader finds it gone, too, and looks again.)
Place Reader::place_of(const Catalog& earlier, const Place& place, Fault& fault) const {
    const std::string& key = place.key;
    const std::uint64_t gone = earlier.shards()[place.shard].shard_id;
    std::optional<Place> now;
    if (catalog_.header_bytes() == earlier.header_bytes()) now = catalog_.find(key);
    const std::uint64_t shard = now ? catalog_.shards()[now->shard].shard_id : 0;
    if (!now || (shard != gone && !catalog_.is_dropped(gone))) throw fault.of(key);
    IndexEntry entry = now->entry;
    entry.offset = place.entry.offset;
    if (entry != place.entry)
        throw Fault(Code::missing, "the sample is gone, and its key has another since this reader was opened")
            .in(fault.path)
            .of(key);
    return *now;
}

Place Reader::find(std::string_view key) const {
    if (std::optional<Place> place = catalog_.find(key)) return *std::move(place);
    throw Fault(Code::missing, "no sample has this key").in(catalog_.directory()).of(std::string(key));
}

FrameHeader Reader::header(const Place& place) const {
    FrameHeader found;
    with_file(place, [&](const Reader& reader, const File& file, const Place& at) { found = reader.header(file, at); });
    return found;
}

FrameHeader Reader::header(const File& file, const Place& place) const {
    try {
        FrameHeader h = catalog_.frame_header(file, place);
        if (h.codec == Codec::drawn && catalog_.header().temperatures.size() != 1)
            throw Fault(Code::corrupt, "a drawn frame in a cache of several temperatures");
        return h;
    } catch (Fault& fault) {
        throw fault.in(file.path()).of(place.key).at(place.entry.offset);
    }
}

template <class Use>
void Reader::blocks(const File& shard, const FrameHeader& h, std::int64_t first, std::int64_t count, Use use) const {
    const std::int64_t last = first + count;
    if (first < 0 || count < 0 || last > h.tokens)
        throw ArgumentError("tokens [" + std::to_string(first) + ", " + std::to_string(last) + ") of a sample of " +
                            std::to_string(h.tokens));
    if (count == 0) return;
    const auto first_block = static_cast<std::size_t>(first / h.block_tokens);
    const auto end_block = static_cast<std::size_t>((last - 1) / h.block_tokens) + 1;
    std::uint64_t begin = h.offset + h.header_bytes(), length = 0;
    for (std::size_t b = 0; b < first_block; ++b) begin += h.blocks[b].bytes;
    for (std::size_t b = first_block; b < end_block; ++b) length += h.blocks[b].bytes;

    // Kept between calls, as fresh pages would cost more than the decoding; but not for ever, after one large sample.
    constexpr std::size_t kept_bytes = std::size_t{8} << 20;
    thread_local std::vector<std::byte> buffer;
    if (buffer.size() < length + padding_after_block) buffer.resize(length + padding_after_block);
    std::uint64_t place = begin;
    try {
        shard.read_at(begin, std::span(buffer).first(length));
        const Layout layout = h.layout(catalog_.header());
        // The rows of wide ones would take too much memory.
        const std::size_t together = h.codec == Codec::compact && h.kept <= 1024 ? most_together : 1;
        std::vector<Part> parts;
        std::uint64_t at = 0;
        for (std::size_t b = first_block; b < end_block; ++b) {
            place = begin + at;
            const Bytes block = Bytes(buffer).subspan(at, h.blocks[b].bytes);
            if (!has_crc(block, h.blocks[b].crc))
                throw Fault(Code::checksum, "the checksum of block " + std::to_string(b) + " does not match");
            const std::int64_t block_first = static_cast<std::int64_t>(b) * h.block_tokens;
            const std::int64_t tokens = h.tokens_of(b);
            const std::int64_t from = std::max(first, block_first), to = std::min(last, block_first + tokens);
            parts.push_back({layout, block, tokens, from - block_first, to - from, from - first, place,
                             Proven::name(h, place, h.blocks[b])});
            at += block.size();
            if (parts.size() < together && b + 1 < end_block) continue;
            try {
                place = parts.front().place;
                use(Parts(parts));
            } catch (const Fault&) {
                if (parts.size() == 1) throw;
                // Which of them it is about.
                for (const Part& part : parts) {
                    place = part.place;
                    use(Parts(&part, 1));
                }
            }
            parts.clear();
        }
    } catch (Fault& fault) {
        throw fault.in(shard.path()).of(h.key).at(place);
    }
    if (buffer.size() > kept_bytes) {
        buffer.clear();
        buffer.shrink_to_fit();
    }
}

void Reader::decode(const Place& place, const File& shard, const FrameHeader& h, const Layout& layout,
                    std::span<const DecodeRequest> requests) const {
    if (layout.codec == Codec::compact)
        return models_.get(place.shard, h.model, shard, h.shard_id, h.offset).decode(layout, requests);
    for (const DecodeRequest& request : requests) cache::decode(layout, request);
}

void Reader::prove(const Place& place, const File& shard, const FrameHeader& h, Parts parts) const {
    read_parts(place, shard, h, parts, [](const Part&) { return Destination{}; });
}

// The parts' tokens to what `out` says of each, or to nobody where that is none. A block that nobody has proven yet is
// decoded as a whole for it, in room of its own where not all of that was asked for.
template <class Out>
void Reader::read_parts(const Place& place, const File& shard, const FrameHeader& h, Parts parts, Out out) const {
    thread_local Scratch scratch;
    const Layout& layout = parts.front().layout;
    const auto has_all = [&](const Part& part, const Destination& to) {
        return part.is_whole() && to.ids && (to.lse || layout.temperatures.empty());
    };
    // Asked once: what other threads prove may take its place in between.
    std::array<bool, most_together> proven{};
    std::int64_t aside = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        proven[i] = proven_.has(parts[i].name);
        if (!proven[i] && !has_all(parts[i], out(parts[i]))) aside += parts[i].tokens;
    }
    const Destination room = aside > 0 ? scratch.rows(layout, aside) : Destination{};
    aside = 0;
    std::array<DecodeRequest, most_together> requests;
    std::array<const Part*, most_together> unproven{};
    std::size_t count = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const Part& part = parts[i];
        const Destination to = out(part);
        if (proven[i]) {
            if (to.ids) requests[count++] = {part.block, part.tokens, part.first, to};
            continue;
        }
        unproven[count] = &part;
        requests[count++] = part.whole(has_all(part, to) ? to : room.rows(aside, part.tokens, layout.kept));
        if (!has_all(part, to)) aside += part.tokens;
    }
    decode(place, shard, h, layout, std::span(requests).first(count));
    for (std::size_t i = 0; i < count; ++i) {
        if (!unproven[i]) continue;
        const Part& part = *unproven[i];
        cache::prove(layout, source_of(requests[i].out));
        proven_.add(part.name);
        if (const Destination to = out(part); to.ids && to.ids != requests[i].out.ids)
            copy(layout, requests[i].out.rows(part.first, part.count, layout.kept), to);
    }
}

void Reader::read(const ReadRequest& request) const {
    const auto read_from = [&](const Reader& reader, const File& shard, const Place& place) {
        const FrameHeader h = reader.header(shard, place);
        reader.blocks(shard, h, request.first, request.out.tokens, [&](Parts parts) {
            reader.read_parts(place, shard, h, parts, [&](const Part& part) {
                return request.out.rows(part.row, part.count, part.layout.kept);
            });
        });
    };
    if (request.file) return read_from(*this, *request.file, *request.place);
    with_file(*request.place, read_from);
}

void Reader::pack(const PackRequest& request) const {
    const auto pack_from = [&](const Reader& reader, const File& shard, const Place& place) {
        const FrameHeader h = reader.header(shard, place);
        *request.out.grid = h.grid;
        reader.blocks(shard, h, request.first, request.tokens, [&](Parts parts) {
            reader.prove(place, shard, h, parts);
            for (const Part& part : parts)
                cache::pack(part.layout, part.block, part.tokens, part.first, part.count, request.out, part.row);
        });
    };
    if (request.file) return pack_from(*this, *request.file, *request.place);
    with_file(*request.place, pack_from);
}

void Reader::verify(const Place& place, const File* elsewhere) const {
    const auto verify_in = [](const Reader& reader, const File& shard, const Place& at) {
        const FrameHeader h = reader.header(shard, at);
        reader.blocks(shard, h, 0, h.tokens, [&](Parts parts) { reader.prove(at, shard, h, parts); });
    };
    if (elsewhere) return verify_in(*this, *elsewhere, place);
    with_file(place, verify_in);
}

namespace {

// In the order of the disk.
template <class Request, class Serve>
void in_order(std::vector<Request> requests, int threads, Serve serve) {
    std::sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
        const auto order = [](const Request& r) { return std::tuple(r.place->shard, r.place->entry.offset, r.first); };
        return order(a) < order(b);
    });
    parallel_for(static_cast<std::int64_t>(requests.size()), threads,
                 [&](std::int64_t i) { serve(requests[static_cast<std::size_t>(i)]); });
}

}  // namespace

void Reader::read(std::vector<ReadRequest> requests, int threads) const {
    in_order(std::move(requests), threads, [this](const ReadRequest& r) { read(r); });
}

void Reader::pack(std::vector<PackRequest> requests, int threads) const {
    in_order(std::move(requests), threads, [this](const PackRequest& r) { pack(r); });
}

}  // namespace kdfast::cache
