#include "cache/format.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"
#include "cache/store/model_frame.h"
#include "core/error.h"

namespace kdfast::cache {
namespace {

constexpr std::uint32_t version = 1;

void require(bool holds, const char* what) {
    if (!holds) corrupt(what);
}
void require_length(Bytes bytes, std::uint64_t length, const char* part) {
    if (bytes.size() < length) throw Fault(Code::truncated, std::string(part) + " ends too early");
}
void require_magic(Bytes bytes, std::string_view magic, const char* part) {
    require_length(bytes, magic.size(), part);
    if (text_of(bytes.first(magic.size())) != magic) corrupt(std::string("this is no ") + part);
}
void require_crc(Bytes covered, std::uint32_t crc, const char* part) {
    if (!has_crc(covered, crc))
        throw Fault(Code::checksum, std::string("the checksum of the ") + part + " does not match");
}

void append_crc(std::vector<std::byte>& out) { append(out, crc32c(out)); }
void append_zeros(std::vector<std::byte>& out, std::size_t until) { out.resize(until); }

bool is_utf8(std::string_view s) {
    for (std::size_t i = 0; i < s.size();) {
        const auto c = static_cast<unsigned char>(s[i]);
        const std::size_t n = c < 0x80 ? 1 : c >> 5 == 6 ? 2 : c >> 4 == 14 ? 3 : c >> 3 == 30 ? 4 : 0;
        if (n == 0 || i + n > s.size()) return false;
        std::uint32_t point = n == 1 ? c : c & (0x7Fu >> n);
        for (std::size_t j = 1; j < n; ++j) {
            const auto next = static_cast<unsigned char>(s[i + j]);
            if (next >> 6 != 2) return false;
            point = point << 6 | (next & 0x3F);
        }
        constexpr std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
        if (point < least[n] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return false;
        i += n;
    }
    return true;
}

bool is_key(std::string_view key) {
    return !key.empty() && key.size() <= most_key_bytes && key.find('\0') == key.npos && is_utf8(key);
}

bool are_temperatures(const std::vector<double>& t) {
    for (std::size_t i = 0; i < t.size(); ++i)
        if (!(t[i] > (i == 0 ? 0 : t[i - 1])) || !std::isfinite(t[i])) return false;
    return !t.empty() && t.size() <= most_temperatures;
}

bool is_drawn(Method method) { return method == Method::sample || method == Method::pps; }

}  // namespace

void check_key(std::string_view key) {
    if (!is_key(key))
        throw ArgumentError("a key must be 1 to " + std::to_string(most_key_bytes) +
                            " bytes of UTF-8 without NUL, got " + std::to_string(key.size()) + " bytes");
}

// --- Cache header

std::vector<std::byte> CacheHeader::bytes() const {
    if (vocab_size < 1 || vocab_size > most_vocab_size)
        throw ArgumentError("vocab_size must be 1 to 2**24, got " + std::to_string(vocab_size));
    if (!are_temperatures(temperatures))
        throw ArgumentError("temperatures must be 1 to 16 different numbers > 0, in ascending order");
    if (shift > 1) throw ArgumentError("shift must be 0 or 1, got " + std::to_string(shift));
    if (metadata.size() > most_metadata)
        throw ArgumentError("metadata must be at most " + std::to_string(most_metadata) + " bytes of JSON, got " +
                            std::to_string(metadata.size()));
    const std::size_t size = align8(32 + 8 * temperatures.size() + metadata.size() + 4);
    std::vector<std::byte> out;
    append(out, bytes_of("KDFCACHE"));
    append(out, version);
    append(out, static_cast<std::uint32_t>(size));
    append(out, vocab_size);
    append(out, static_cast<std::uint8_t>(temperatures.size()));
    append(out, shift);
    append(out, std::uint16_t{0});
    append(out, static_cast<std::uint32_t>(metadata.size()));
    append(out, std::uint32_t{0});
    for (const double t : temperatures) append(out, t);
    append(out, bytes_of(metadata));
    append_zeros(out, size - 4);
    append_crc(out);
    return out;
}

CacheHeader CacheHeader::parse(Bytes bytes, std::size_t* size_out) {
    constexpr const char* part = "cache header";
    require_magic(bytes, "KDFCACHE", part);
    require_length(bytes, 12, part);
    if (const auto v = load<std::uint32_t>(bytes, 8); v != version)
        throw Fault(Code::version, "format version " + std::to_string(v) + ": this build reads version 1");
    require_length(bytes, 32, part);
    const auto size = load<std::uint32_t>(bytes, 12);
    require(size >= 40 && size % 8 == 0 && size <= most_cache_header, "the cache header's length is impossible");
    require_length(bytes, size, part);
    require_crc(bytes.first(size - 4), load<std::uint32_t>(bytes, size - 4), part);
    CacheHeader h;
    h.vocab_size = load<std::uint32_t>(bytes, 16);
    const std::size_t temperatures = load<std::uint8_t>(bytes, 20);
    h.shift = load<std::uint8_t>(bytes, 21);
    const std::size_t metadata = load<std::uint32_t>(bytes, 24);
    require(h.vocab_size >= 1 && h.vocab_size <= most_vocab_size, "vocab_size is beyond its limits");
    require(h.shift <= 1, "shift is neither 0 nor 1");
    require(temperatures <= most_temperatures && metadata <= most_metadata &&
                size == align8(32 + 8 * temperatures + metadata + 4),
            "the cache header's lengths do not add up");
    require(all_zero(bytes.subspan(22, 2)) && all_zero(bytes.subspan(28, 4)) &&
                all_zero(bytes.first(size - 4).subspan(32 + 8 * temperatures + metadata)),
            "padding of the cache header is not zero");
    for (std::size_t i = 0; i < temperatures; ++i) h.temperatures.push_back(load<double>(bytes, 32 + 8 * i));
    require(are_temperatures(h.temperatures), "the cache header's temperatures are not ascending numbers > 0");
    h.metadata = text_of(bytes.subspan(32 + 8 * temperatures, metadata));
    require(is_utf8(h.metadata), "the metadata are not UTF-8");
    if (size_out) *size_out = size;
    return h;
}

std::vector<double> CacheHeader::stored_temperatures() const {
    std::vector<double> out;
    for (const double t : temperatures)
        if (t != 1) out.push_back(t);
    return out;
}

// --- Shard header, index, tail

std::array<std::byte, ShardHeader::size> ShardHeader::bytes() const {
    std::array<std::byte, size> out{};
    std::memcpy(out.data(), "KDFSHARD", 8);
    store(&out[8], shard_id);
    store(&out[16], writer);
    store(&out[24], ordinal);
    store(&out[28], crc32c(Bytes(out).first(28)));
    return out;
}

ShardHeader ShardHeader::parse(Bytes bytes) {
    constexpr const char* part = "shard header";
    require_length(bytes, size, part);
    require_magic(bytes, "KDFSHARD", part);
    require_crc(bytes.first(28), load<std::uint32_t>(bytes, 28), part);
    ShardHeader h;
    h.shard_id = load<std::uint64_t>(bytes, 8);
    h.writer = load<std::uint64_t>(bytes, 16);
    h.ordinal = load<std::uint32_t>(bytes, 24);
    require(h.shard_id != 0, "a shard's id is 0");
    return h;
}

void IndexEntry::append_to(std::vector<std::byte>& out) const {
    append(out, offset);
    append(out, frame_bytes);
    append(out, Bytes(token_hash));
    append(out, header_bytes);
    append(out, tokens);
    append(out, kept);
    append(out, key_bytes);
    append(out, kind);
    append(out, flags);
    append(out, method);
    append(out, codec);
}

IndexEntry IndexEntry::parse(Bytes bytes) {
    const std::byte* p = bytes.first(size).data();
    IndexEntry e;
    e.offset = load<std::uint64_t>(p);
    e.frame_bytes = load<std::uint64_t>(p + 8);
    std::memcpy(e.token_hash.data(), p + 16, 16);
    e.header_bytes = load<std::uint32_t>(p + 32);
    e.tokens = load<std::uint32_t>(p + 36);
    e.kept = load<std::uint16_t>(p + 40);
    e.key_bytes = load<std::uint16_t>(p + 42);
    e.kind = Kind{load<std::uint8_t>(p + 44)};
    e.flags = load<std::uint8_t>(p + 45);
    e.method = Method{load<std::uint8_t>(p + 46)};
    e.codec = Codec{load<std::uint8_t>(p + 47)};
    require(e.frame_bytes % 8 == 0 && e.header_bytes <= e.frame_bytes, "an entry's frame has no room for its header");
    if (e.kind == Kind::model) {
        require(e.header_bytes == ModelHeader::size && all_zero(Bytes(p + 16, 16)) && all_zero(Bytes(p + 36, 8)) &&
                    all_zero(Bytes(p + 45, 3)),
                "a model's entry says what it may not");
        return e;
    }
    require(e.kind == Kind::sample, "an entry of the index is of an unknown kind");
    require(e.tokens <= most_tokens && e.kept >= 1 && std::uint64_t{e.tokens} * e.kept <= most_entries &&
                e.header_bytes <= FrameHeader::most_bytes && e.flags <= flag::all && e.method <= Method::pps &&
                e.codec >= Codec::fixed && e.codec <= Codec::drawn,
            "an entry of the index is beyond its limits");
    return e;
}

void Index::add(const IndexEntry& entry, std::string_view key) {
    entries.push_back(entry);
    keys += key;
}

std::vector<std::byte> Index::bytes(std::uint64_t shard_id) const {
    std::vector<std::byte> out;
    out.reserve(32 + entries.size() * IndexEntry::size + keys.size() + 12);
    append(out, bytes_of("KDFINDEX"));
    append(out, shard_id);
    append(out, std::uint64_t{entries.size()});
    append(out, std::uint64_t{keys.size()});
    for (const IndexEntry& e : entries) e.append_to(out);
    append(out, bytes_of(keys));
    append_zeros(out, align8(out.size() + 4) - 4);
    append_crc(out);
    return out;
}

Index Index::parse(Bytes bytes, std::uint64_t shard_id, std::uint64_t first, std::uint64_t end) {
    constexpr const char* part = "index";
    require(bytes.size() >= 40 && bytes.size() % 8 == 0, "the index's length is impossible");
    require_magic(bytes, "KDFINDEX", part);
    require_crc(bytes.first(bytes.size() - 4), load<std::uint32_t>(bytes, bytes.size() - 4), part);
    if (load<std::uint64_t>(bytes, 8) != shard_id) throw Fault(Code::mismatch, "the index is of another shard");
    const auto count = load<std::uint64_t>(bytes, 16), key_bytes = load<std::uint64_t>(bytes, 24);
    require(count <= bytes.size() / IndexEntry::size && key_bytes <= bytes.size() &&
                align8(32 + count * IndexEntry::size + key_bytes + 4) == bytes.size(),
            "the index's lengths do not add up");
    const std::size_t keys_at = 32 + count * IndexEntry::size;
    require(all_zero(bytes.first(bytes.size() - 4).subspan(keys_at + key_bytes)), "padding of the index is not zero");
    Index index;
    index.keys = text_of(bytes.subspan(keys_at, key_bytes));
    index.entries.reserve(count);
    std::uint64_t key_at = 0, place = first;
    for (std::uint64_t i = 0; i < count; ++i) {
        const IndexEntry e = IndexEntry::parse(bytes.subspan(32 + i * IndexEntry::size, IndexEntry::size));
        require(e.offset == place && e.frame_bytes <= end - place, "the index's frames leave a hole or overlap");
        place += e.frame_bytes;
        if (e.kind == Kind::sample)
            require(
                e.key_bytes <= key_bytes - key_at && is_key(std::string_view(index.keys).substr(key_at, e.key_bytes)),
                "a key of the index is impossible");
        key_at += e.key_bytes;
        index.entries.push_back(e);
    }
    require(place == end, "the index's frames leave a hole or overlap");
    require(key_at == key_bytes, "the index holds keys of no entry");
    return index;
}

std::array<std::byte, Tail::size> Tail::bytes() const {
    std::array<std::byte, size> out{};
    store(&out[0], shard_id);
    store(&out[8], index_offset);
    store(&out[16], index_bytes);
    store(&out[24], crc32c(Bytes(out).first(24)));
    std::memcpy(&out[28], "KDFT", 4);
    return out;
}

Tail Tail::parse(Bytes bytes) {
    constexpr const char* part = "shard's tail";
    require_length(bytes, size, part);
    if (text_of(bytes.subspan(28, 4)) != "KDFT") corrupt("the shard has no tail");
    require_crc(bytes.first(24), load<std::uint32_t>(bytes, 24), part);
    return {load<std::uint64_t>(bytes, 0), load<std::uint64_t>(bytes, 8), load<std::uint64_t>(bytes, 16)};
}

// --- Frames

std::uint64_t FrameHeader::frame_bytes() const {
    std::uint64_t n = header_bytes();
    for (const BlockEntry& b : blocks) n += b.bytes;
    return n;
}

std::uint32_t FrameHeader::tokens_of(std::size_t block) const {
    return std::min<std::uint32_t>(block_tokens, tokens - static_cast<std::uint32_t>(block) * block_tokens);
}

Layout FrameHeader::layout(const CacheHeader& cache) const {
    return {.codec = codec,
            .method = method,
            .vocab_size = cache.vocab_size,
            .kept = kept,
            .grid = grid,
            .draws = method == Method::sample ? parameter : 0,
            .ragged = (flags & flag::ragged) != 0,
            .gold = (flags & flag::gold) != 0,
            .temperatures = is_drawn(method) ? std::vector<double>() : cache.stored_temperatures()};
}

IndexEntry FrameHeader::entry() const {
    return {.offset = offset,
            .frame_bytes = frame_bytes(),
            .token_hash = token_hash,
            .header_bytes = static_cast<std::uint32_t>(header_bytes()),
            .tokens = tokens,
            .kept = kept,
            .key_bytes = static_cast<std::uint16_t>(key.size()),
            .kind = Kind::sample,
            .flags = flags,
            .method = method,
            .codec = codec};
}

std::vector<std::byte> FrameHeader::bytes() const {
    std::vector<std::byte> out;
    out.reserve(header_bytes());
    append(out, bytes_of("KDFR"));
    append(out, static_cast<std::uint32_t>(header_bytes()));
    append(out, frame_bytes());
    append(out, offset);
    append(out, shard_id);
    append(out, seed);
    append(out, parameter);
    append(out, Bytes(token_hash));
    append(out, tokens);
    append(out, kept);
    append(out, static_cast<std::uint16_t>(key.size()));
    append(out, block_tokens);
    append(out, codec);
    append(out, method);
    append(out, grid);
    append(out, flags);
    append(out, std::uint16_t{0});
    append(out, model);
    append(out, bytes_of(key));
    append_zeros(out, align8(out.size()));
    for (const BlockEntry& b : blocks) {
        append(out, b.bytes);
        append(out, b.crc);
    }
    append(out, static_cast<std::uint32_t>(blocks.size()));
    append_crc(out);
    return out;
}

FrameLengths FrameLengths::parse(Bytes bytes) {
    require_magic(bytes, "KDFR", "frame");
    require_length(bytes, size, "frame");
    const FrameLengths n{load<std::uint32_t>(bytes, 4), load<std::uint64_t>(bytes, 8)};
    require(n.header_bytes % 8 == 0 && n.frame_bytes % 8 == 0 && n.header_bytes >= FrameHeader::least_bytes &&
                n.header_bytes <= FrameHeader::most_bytes && n.header_bytes <= n.frame_bytes &&
                n.frame_bytes <= most_shard_bytes,
            "a frame's lengths are impossible");
    return n;
}

FrameHeader FrameHeader::parse(Bytes bytes) {
    const FrameLengths lengths = FrameLengths::parse(bytes);
    require(lengths.header_bytes == bytes.size(), "a frame's header is not as long as it should be");
    require_crc(bytes.first(bytes.size() - 4), load<std::uint32_t>(bytes, bytes.size() - 4), "frame header");
    FrameHeader h;
    h.offset = load<std::uint64_t>(bytes, 16);
    h.shard_id = load<std::uint64_t>(bytes, 24);
    h.seed = load<std::uint64_t>(bytes, 32);
    h.parameter = load<double>(bytes, 40);
    std::memcpy(h.token_hash.data(), &bytes[48], 16);
    h.tokens = load<std::uint32_t>(bytes, 64);
    h.kept = load<std::uint16_t>(bytes, 68);
    const std::size_t key_bytes = load<std::uint16_t>(bytes, 70);
    h.block_tokens = load<std::uint16_t>(bytes, 72);
    h.codec = Codec{load<std::uint8_t>(bytes, 74)};
    h.method = Method{load<std::uint8_t>(bytes, 75)};
    h.grid = load<std::uint8_t>(bytes, 76);
    h.flags = load<std::uint8_t>(bytes, 77);
    h.model = load<std::uint64_t>(bytes, 80);
    require(load<std::uint16_t>(bytes, 78) == 0, "a reserved field of a frame is not zero");
    require(h.tokens <= most_tokens && h.kept >= 1 && std::uint64_t{h.tokens} * h.kept <= most_entries &&
                is_block_tokens(h.block_tokens) && h.grid >= least_grid && h.grid <= most_grid,
            "a frame is beyond the format's limits");
    require(h.method <= Method::pps && h.codec >= Codec::fixed && h.codec <= Codec::drawn &&
                is_drawn(h.method) == (h.codec == Codec::drawn) && (h.model == 0 || h.codec == Codec::compact),
            "a frame's method and codec do not go together");
    require(h.codec != Codec::compact || (h.model > 0 && h.model < h.offset && h.model % 8 == 0),
            "a compact frame's model does not lie before it");
    require(h.flags <= flag::all && (is_drawn(h.method) || !(h.flags & flag::seeded)) &&
                (h.flags & flag::hashed || all_zero(h.token_hash)) && (h.flags & flag::seeded || h.seed == 0),
            "a frame's flags do not go with its fields");
    switch (h.method) {
        case Method::topp:
            require(h.parameter >= 0 && h.parameter <= 1, "a frame's mass is not in [0, 1]");
            break;
        case Method::sample:
            require(h.parameter >= 1 && h.parameter <= 0x1p24 && h.parameter == std::floor(h.parameter),
                    "a frame's number of draws is impossible");
            break;
        default:
            require(h.parameter == 0 && !std::signbit(h.parameter), "a frame has a parameter without a meaning");
    }
    const std::size_t blocks = (h.tokens + h.block_tokens - 1u) / h.block_tokens;
    require(fixed_bytes + align8(key_bytes) + 8 * blocks + 8 == bytes.size() &&
                load<std::uint32_t>(bytes, bytes.size() - 8) == blocks,
            "a frame header's lengths do not add up");
    h.key = text_of(bytes.subspan(fixed_bytes, key_bytes));
    require(is_key(h.key), "a frame's key is impossible");
    require(all_zero(bytes.subspan(fixed_bytes + key_bytes, align8(key_bytes) - key_bytes)),
            "padding of a frame header is not zero");
    for (std::size_t b = 0; b < blocks; ++b) {
        const std::size_t at = fixed_bytes + align8(key_bytes) + 8 * b;
        h.blocks.push_back({load<std::uint32_t>(bytes, at), load<std::uint32_t>(bytes, at + 4)});
        require(h.blocks.back().bytes % 8 == 0, "a block's length is not a multiple of 8");
        require(h.blocks.back().bytes <= most_block_bytes(h.tokens_of(b), h.kept),
                "a block is longer than its tokens can be");
    }
    require(h.frame_bytes() == lengths.frame_bytes, "a frame's lengths do not add up");
    return h;
}

// --- Journal

std::array<std::byte, Record::size> Record::to_bytes() const {
    std::array<std::byte, size> out{};
    std::memcpy(out.data(), "KDFJ", 4);
    store(&out[4], type);
    store(&out[8], writer);
    store(&out[16], number);
    store(&out[20], ordinal);
    store(&out[24], shard_id);
    store(&out[32], bytes);
    store(&out[40], samples);
    store(&out[48], time);
    store(&out[56], crc32c(Bytes(out).first(56)));
    std::memcpy(&out[60], "KDFE", 4);
    return out;
}

Record Record::parse(Bytes bytes) {
    constexpr const char* part = "journal record";
    require_length(bytes, size, part);
    require_magic(bytes, "KDFJ", part);
    require(text_of(bytes.subspan(60, 4)) == "KDFE", "a journal record does not end as it should");
    require_crc(bytes.first(56), load<std::uint32_t>(bytes, 56), part);
    Record r;
    r.type = RecordType{load<std::uint32_t>(bytes, 4)};
    r.writer = load<std::uint64_t>(bytes, 8);
    r.number = load<std::uint32_t>(bytes, 16);
    r.ordinal = load<std::uint32_t>(bytes, 20);
    r.shard_id = load<std::uint64_t>(bytes, 24);
    r.bytes = load<std::uint64_t>(bytes, 32);
    r.samples = load<std::uint64_t>(bytes, 40);
    r.time = load<std::uint64_t>(bytes, 48);
    require(r.type >= RecordType::begin && r.type <= RecordType::drop, "a journal record is of an unknown type");
    require(r.bytes <= most_shard_bytes && r.bytes % 8 == 0, "a journal record has an impossible length");
    return r;
}

// --- Names

std::optional<std::uint64_t> id_of(std::string_view name, std::string_view suffix) {
    if (!name.ends_with(suffix) || name.size() < 16 + suffix.size()) return {};
    std::uint64_t id = 0;
    for (const char c : name.substr(0, 16)) {
        const bool digit = c >= '0' && c <= '9', letter = c >= 'a' && c <= 'f';
        if (!digit && !letter) return {};
        id = id << 4 | static_cast<std::uint64_t>(digit ? c - '0' : c - 'a' + 10);
    }
    return id;
}

std::string journal_name(std::uint64_t writer) {
    char text[32];
    std::snprintf(text, sizeof text, "%016llx.journal", static_cast<unsigned long long>(writer));
    return text;
}

std::string shard_name(std::uint64_t writer, std::uint32_t ordinal, bool finished) {
    char text[48];
    std::snprintf(text, sizeof text, "%016llx-%06u.%s", static_cast<unsigned long long>(writer), ordinal,
                  finished ? "shard" : "open");
    return text;
}

}  // namespace kdfast::cache
