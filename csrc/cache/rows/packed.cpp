#include "cache/rows/packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "cache/bytes.h"
#include "cache/kernels.h"
#include "cache/rows/fields.h"
#include "cache/rows/fixed.h"
#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
void PackedBytes::reserve(std::size_t bytes) {
    std::unique_ptr<std::byte, Free> more(static_cast<std::byte*>(std::malloc(bytes)));
    if (!more) throw std::bad_alloc();
    if (size_ > 0) std::memcpy(more.get(), data_, size_);
    own_ = std::move(more);
    data_ = own_.get();
    capacity_ = bytes;
}

namespace {

constexpr std::int64_t at_once = 32;
static_assert(at_once <= padding_after_block);

// Copies whole chunks: up to at_once - 1 bytes more than asked for are loaded, and stored.
void copy_chunks(std::byte* to, const std::byte* from, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += at_once) std::memcpy(to + i, from + i, at_once);
}

}  // namespace

void pack(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
          std::int64_t count, const Packed& out, std::int64_t row) {
    if (layout.codec != Codec::fixed) throw ArgumentError("only blocks of the fixed codec can be packed");
    if (first < 0 || count < 0 || count > tokens - first) throw ArgumentError("tokens beyond the block");
    decode_fixed(layout, block, tokens, first, out.rest.rows(row, count, layout.kept));

    Sections sections(block);
    const std::byte* tops = sections.take(4 * tokens, "top");
    sections.take(4 * tokens * static_cast<std::int64_t>(layout.temperatures.size()), "lse");
    if (layout.gold) sections.take(4 * tokens, "gold");
    const Widths widths(layout, sections, tokens, false);
    const unsigned bits = layout.id_bits();
    std::int64_t ids_bytes = 0, deltas_bytes = 0;
    for (std::int64_t i = 0; i < tokens; ++i) {
        ids_bytes += id_bytes(widths[i], bits);
        deltas_bytes += delta_bytes(widths[i]);
    }
    const std::byte* ids = sections.take(ids_bytes, "ids");
    const std::byte* deltas = sections.take(deltas_bytes, "deltas");
    const std::span<const std::byte> rest = sections.rest();
    const std::byte *escapes = rest.data(), *const end = escapes + rest.size();
    const Kernels& kernels = *cpu::kernels().cache;
    std::int64_t ids_before = 0, deltas_before = 0;
    for (std::int64_t i = 0; i < first; ++i) {
        ids_before += id_bytes(widths[i], bits);
        deltas_before += delta_bytes(widths[i]);
    }
    escapes = skip_escapes(escapes, end, kernels.count_escapes(deltas, deltas_before));
    ids += ids_before;
    deltas += deltas_before;

    PackedBytes& data = *out.data;
    // Of each token, and what is stored beyond it, up to 3 bytes to the next multiple of 4.
    const std::int64_t most = ids_bytes - ids_before + deltas_bytes - deltas_before + (end - escapes) + 3 * count;
    std::byte* const begin = data.room(static_cast<std::size_t>(most + at_once));
    std::byte* at = begin;
    for (std::int64_t i = first; i < first + count; ++i) {
        const std::int64_t k = widths[i], of_ids = id_bytes(k, bits), of_deltas = delta_bytes(k);
        const std::byte* behind = skip_escapes(escapes, end, kernels.count_escapes(deltas, of_deltas));
        const std::int64_t offset = static_cast<std::int64_t>(data.size()) + (at - begin), to = row + i - first;
        if (offset / 4 > std::numeric_limits<std::int32_t>::max())
            throw ArgumentError("a sample of more than 2^33 bytes");
        out.offset[to] = static_cast<std::int32_t>(offset / 4);
        out.top[to] = load<float>(tops + 4 * i);
        copy_chunks(at, ids, of_ids);
        copy_chunks(at + of_ids, deltas, of_deltas);
        copy_chunks(at + of_ids + of_deltas, escapes, behind - escapes);
        const std::int64_t bytes = of_ids + of_deltas + (behind - escapes);
        store(at + bytes, std::uint32_t{0});
        at += (bytes + 3) / 4 * 4;
        ids += of_ids;
        deltas += of_deltas;
        escapes = behind;
    }
    data.grow(static_cast<std::size_t>(at - begin));
}

namespace {

void unpack_token(const Kernels& kernels, const Layout& layout, const PackedSource& packed, std::int64_t token,
                  std::int32_t* ids, float* logprobs) {
    const auto wrong = [token](const std::string& what) {
        throw ArgumentError("token " + std::to_string(token) + " of packed targets " + what);
    };
    const std::int64_t kept = layout.kept, k = packed.k_eff ? packed.k_eff[token] : kept;
    if (k < 0 || k > kept) wrong("has a k_eff of " + std::to_string(k) + ", not 0 to " + std::to_string(kept));
    if (k == 0) {
        std::fill_n(ids, kept, -1);
        std::fill_n(logprobs, kept, -std::numeric_limits<float>::infinity());
        return;
    }
    const std::int64_t of_ids = id_bytes(k, layout.id_bits()), of_deltas = delta_bytes(k);
    const std::int64_t begin = std::int64_t{4} * packed.offset[token];
    const auto size = static_cast<std::int64_t>(packed.data.size());
    if (begin < 0 || begin > size || of_ids + of_deltas > size - begin) wrong("begins or ends beyond their data");
    std::span<const std::byte> bytes = packed.data.subspan(static_cast<std::size_t>(begin));
    bytes = bytes.first(static_cast<std::size_t>(
        std::min<std::int64_t>(size - begin, of_ids + of_deltas + 5 * k)));  // no escapes take more
    // The decoder may load what is behind the last one.
    thread_local std::vector<std::byte> copy;
    const std::byte* from = bytes.data();
    if (begin + static_cast<std::int64_t>(bytes.size() + padding_after_block) > size) {
        copy.assign(bytes.begin(), bytes.end());
        copy.resize(bytes.size() + padding_after_block);
        from = copy.data();
    }
    FixedRows row;
    row.rows = 1;
    row.kept = kept;
    const auto own = static_cast<std::uint16_t>(k);
    row.k_eff = &own;
    row.id_bits = layout.id_bits();
    row.vocab_size = layout.vocab_size;
    row.step = std::ldexp(1.0f, -static_cast<int>(layout.grid));
    row.tops = reinterpret_cast<const std::byte*>(packed.top + token);
    row.ids = from;
    row.deltas = from + of_ids;
    row.escapes = row.deltas + of_deltas;
    row.escapes_end = from + bytes.size();
    row.out_ids = ids;
    row.out_logprobs = logprobs;
    switch (kernels.decode_fixed(row)) {
        case Broken::none:
            return;
        case Broken::id:
            return wrong("has an id that is not below " + std::to_string(layout.vocab_size));
        case Broken::words:
        case Broken::escapes:
            return wrong("has escapes that are missing or wrong");
        case Broken::steps:
            return wrong("has deltas of 2^24 steps or more");
    }
}

}  // namespace

void unpack(const Layout& layout, const PackedSource& packed, std::int32_t* ids, float* logprobs, int threads) {
    if (layout.kept < 1 || layout.kept > 65535 || layout.vocab_size < 1 || layout.vocab_size > 1u << 24 ||
        layout.grid < 2 || layout.grid > 10)
        throw ArgumentError("kept must be 1 to 65535, vocab_size 1 to 2^24 and grid 2 to 10");
    constexpr std::int64_t together = 64;
    const Kernels& kernels = *cpu::kernels().cache;
    parallel_for((packed.tokens + together - 1) / together, threads, [&](std::int64_t part) {
        for (std::int64_t i = part * together; i < std::min(packed.tokens, (part + 1) * together); ++i)
            unpack_token(kernels, layout, packed, i, ids + i * layout.kept, logprobs + i * layout.kept);
    });
}

}  // namespace kdfast::cache
