#include "cache/store/model_frame.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "cache/compact/model.h"
#include "cache/crc/crc32c.h"
#include "cache/fault.h"

namespace kdfast::cache {
namespace {

constexpr std::string_view magic = "KDFM";
constexpr std::uint64_t most_frame_bytes = align8(ModelHeader::size + most_model_bytes);
constexpr std::uint64_t search_bytes = std::uint64_t{1} << 25;  // for a second copy, as the first's length is not known

}  // namespace

IndexEntry ModelHeader::entry() const {
    IndexEntry entry;
    entry.offset = offset;
    entry.frame_bytes = frame_bytes();
    entry.header_bytes = size;
    entry.kind = Kind::model;
    entry.codec = Codec{0};
    return entry;
}

std::array<std::byte, ModelHeader::size> ModelHeader::bytes() const {
    std::array<std::byte, size> out{};
    std::memcpy(out.data(), magic.data(), magic.size());
    store(&out[4], payload_bytes);
    store(&out[8], frame_bytes());
    store(&out[16], offset);
    store(&out[24], shard_id);
    store(&out[32], first_copy);
    store(&out[40], payload_crc);
    store(&out[52], crc32c(Bytes(out).first(52)));
    return out;
}

ModelHeader ModelHeader::parse(Bytes bytes) {
    if (!is_model_frame(bytes)) corrupt("this is no model frame");
    if (bytes.size() < size) throw Fault(Code::truncated, "a model frame ends too early");
    ModelHeader h;
    h.payload_bytes = load<std::uint32_t>(bytes, 4);
    if (h.payload_bytes < 1 || h.payload_bytes > most_model_bytes || load<std::uint64_t>(bytes, 8) != h.frame_bytes())
        corrupt("a model frame's lengths are impossible");
    if (!has_crc(bytes.first(52), load<std::uint32_t>(bytes, 52)))
        throw Fault(Code::checksum, "the checksum of the model frame's header does not match");
    h.offset = load<std::uint64_t>(bytes, 16);
    h.shard_id = load<std::uint64_t>(bytes, 24);
    h.first_copy = load<std::uint64_t>(bytes, 32);
    h.payload_crc = load<std::uint32_t>(bytes, 40);
    if (!all_zero(bytes.subspan(44, 8))) corrupt("a reserved field of a model frame is not zero");
    if (h.first_copy != h.offset && h.first_copy + h.frame_bytes() != h.offset)
        corrupt("a model frame is no copy of what it says");
    return h;
}

bool is_model_frame(Bytes bytes) { return bytes.size() >= magic.size() && text_of(bytes.first(magic.size())) == magic; }

ModelHeader read_model_header(const File& shard, std::uint64_t shard_id, std::uint64_t offset, std::uint64_t end) {
    try {
        if (offset > end || end - offset < ModelHeader::size)
            throw Fault(Code::truncated, "a model frame ends too early");
        const ModelHeader header = ModelHeader::parse(shard.bytes_at(offset, ModelHeader::size));
        if (header.offset != offset || header.shard_id != shard_id)
            throw Fault(Code::mismatch, "a model frame lies where it was not written");
        if (header.frame_bytes() > end - offset)
            throw Fault(Code::truncated, "a model frame is longer than what is there");
        return header;
    } catch (Fault& fault) {
        throw fault.in(shard.path()).at(offset);
    }
}

std::vector<std::byte> read_model_copy(const File& shard, const ModelHeader& header) {
    try {
        std::vector<std::byte> payload =
            shard.bytes_at(header.offset + ModelHeader::size, header.frame_bytes() - ModelHeader::size);
        if (!has_crc(Bytes(payload).first(header.payload_bytes), header.payload_crc))
            throw Fault(Code::checksum, "the checksum of a model does not match");
        if (!all_zero(Bytes(payload).subspan(header.payload_bytes))) corrupt("padding of a model frame is not zero");
        payload.resize(header.payload_bytes);
        return payload;
    } catch (Fault& fault) {
        throw fault.in(shard.path()).at(header.offset);
    }
}

std::vector<std::byte> read_model(const File& shard, std::uint64_t shard_id, std::uint64_t offset, std::uint64_t end) {
    std::optional<Fault> first_fault;
    std::uint64_t second = offset + 8, search_end = std::min(end, offset + search_bytes);
    try {
        const ModelHeader header = read_model_header(shard, shard_id, offset, end);
        if (header.first_copy != offset) throw Fault(Code::mismatch, "a frame names a model's second copy");
        second = offset + header.frame_bytes();
        search_end = second + 1;
        return read_model_copy(shard, header);
    } catch (const Fault& fault) {
        first_fault = fault;
    }
    // Where the first one's length is known the second is right behind it, else it has to be looked for.
    const std::uint64_t from = second;
    std::vector<std::byte> there;
    if (search_end > from && end > from)
        there = shard.bytes_at(
            from, std::min({search_end - from + ModelHeader::size, end - from, most_frame_bytes + ModelHeader::size}));
    for (; second < search_end && second - from + ModelHeader::size <= there.size(); second += 8) {
        if (!is_model_frame(Bytes(there).subspan(second - from))) continue;
        try {
            const ModelHeader header = read_model_header(shard, shard_id, second, end);
            if (header.first_copy == offset && header.offset != offset) return read_model_copy(shard, header);
        } catch (const Fault& fault) {
            if (fault.code == Code::system) throw;  // else: not a copy, or one that is damaged too
        }
    }
    throw *first_fault;
}

}  // namespace kdfast::cache
