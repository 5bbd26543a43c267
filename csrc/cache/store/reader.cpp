#include "cache/store/reader.h"

#include <algorithm>
#include <tuple>

#include "cache/compact/block.h"
#include "cache/crc/crc32c.h"
#include "cache/fault.h"
#include "core/error.h"
#include "core/threads.h"

namespace kdfast::cache {

Reader::Reader(const std::string& directory, std::vector<Fault>* damage)
    : catalog_(directory, damage),
      files_(catalog_.shards().size()),
      models_(files_.size(), catalog_.header().vocab_size, catalog_.header().stored_temperatures().size()) {}

Reader::~Reader() {
    for (const auto& file : files_) delete file.load();
}

const File& Reader::file(const Place& place) const {
    std::atomic<const File*>& slot = files_[place.shard];
    if (const File* open = slot.load(std::memory_order_acquire)) return *open;
    const CatalogShard& shard = catalog_.shards()[place.shard];
    std::unique_ptr<const File> mine;
    try {
        mine = std::make_unique<const File>(File::read(catalog_.path(shard)));
    } catch (const Fault& fault) {
        if (fault.code != Code::missing || shard.finished) throw;  // its writer may have finished it since
        mine = std::make_unique<const File>(
            File::read(join(catalog_.directory(), shard_name(shard.writer, shard.ordinal, true))));
    }
    const File* none = nullptr;
    if (slot.compare_exchange_strong(none, mine.get(), std::memory_order_acq_rel)) return *mine.release();
    return *none;  // another thread was first
}

const Place& Reader::find(std::string_view key) const {
    if (const Place* place = catalog_.find(key)) return *place;
    throw Fault(Code::missing, "no sample has this key").in(catalog_.directory()).of(std::string(key));
}

FrameHeader Reader::header(const File& file, const Place& place) const {
    try {
        FrameHeader h = catalog_.frame_header(file, place);
        if (h.codec == Codec::drawn && catalog_.header().temperatures.size() != 1)
            throw Fault(Code::corrupt, "a drawn frame in a cache of several temperatures");
        return h;
    } catch (Fault& fault) {
        throw fault.in(file.path()).of(std::string(catalog_.key(place))).at(place.entry.offset);
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
    std::uint64_t at = 0;
    try {
        shard.read_at(begin, std::span(buffer).first(length));
        const Layout layout = h.layout(catalog_.header());
        for (std::size_t b = first_block; b < end_block; ++b) {
            const Bytes block = Bytes(buffer).subspan(at, h.blocks[b].bytes);
            if (!has_crc(block, h.blocks[b].crc))
                throw Fault(Code::checksum, "the checksum of block " + std::to_string(b) + " does not match");
            const std::int64_t block_first = static_cast<std::int64_t>(b) * h.block_tokens;
            const std::int64_t tokens = h.tokens_of(b);
            const std::int64_t from = std::max(first, block_first), to = std::min(last, block_first + tokens);
            use(layout, block, tokens, from - block_first, to - from, from - first);
            at += block.size();
        }
    } catch (Fault& fault) {
        throw fault.in(shard.path()).of(h.key).at(begin + at);
    }
    if (buffer.size() > kept_bytes) {
        buffer.clear();
        buffer.shrink_to_fit();
    }
}

void Reader::read(const ReadRequest& request) const {
    const Place& place = *request.place;
    const File& shard = request.file ? *request.file : file(place);
    const FrameHeader frame = header(shard, place);
    blocks(shard, frame, request.first, request.out.tokens,
           [&](const Layout& layout, Bytes block, std::int64_t tokens, std::int64_t first, std::int64_t count,
               std::int64_t row) {
               const Destination out = request.out.rows(row, count, layout.kept);
               if (layout.codec != Codec::compact) return decode(layout, block, tokens, first, out);
               decode_compact(models_.get(place.shard, frame.model, shard, frame.shard_id, frame.offset), layout, block,
                              tokens, first, out);
           });
}

void Reader::pack(const PackRequest& request) const {
    const File& shard = request.file ? *request.file : file(*request.place);
    const FrameHeader frame = header(shard, *request.place);
    *request.out.grid = frame.grid;
    blocks(shard, frame, request.first, request.tokens,
           [&](const Layout& layout, Bytes block, std::int64_t tokens, std::int64_t first, std::int64_t count,
               std::int64_t row) { cache::pack(layout, block, tokens, first, count, request.out, row); });
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
