#include "cache/rows/packed.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cache/kernels.h"
#include "cache/rows/fields.h"
#include "cache/rows/fixed.h"
#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
namespace {

// Entries that are decoded at a time, only to be checked.
constexpr std::int64_t checked_entries = 1 << 14;

// That no id of a token stands there twice; one bit for each column, kept between blocks.
class Columns {
  public:
    void check(const std::int32_t* ids, std::int64_t count, std::int64_t token, std::uint32_t vocab_size) {
        words_.resize(std::max<std::size_t>(words_.size(), (vocab_size + 63) / 64));
        std::uint64_t twice = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            const auto id = static_cast<std::uint32_t>(ids[i]);
            std::uint64_t& word = words_[id / 64];
            const std::uint64_t bit = std::uint64_t{1} << id % 64;
            twice |= word & bit;
            word |= bit;
        }
        for (std::int64_t i = 0; i < count; ++i) words_[static_cast<std::uint32_t>(ids[i]) / 64] = 0;
        if (twice) corrupt("token " + std::to_string(token) + " of a block has an id twice");
    }

  private:
    std::vector<std::uint64_t> words_;
};

// Decodes the tokens, which is what finds everything that is wrong with them.
void check(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
           std::int64_t count, const Destination& rest) {
    thread_local std::vector<std::int32_t> ids, k_eff;
    thread_local std::vector<float> logprobs;
    thread_local Columns columns;
    const std::int64_t kept = layout.kept, at_once = std::max<std::int64_t>(1, checked_entries / kept);
    const auto rows = static_cast<std::size_t>(std::min(at_once, count));
    ids.resize(std::max(ids.size(), rows * layout.kept));
    logprobs.resize(std::max(logprobs.size(), rows * layout.kept));
    k_eff.resize(std::max(k_eff.size(), rows));
    for (std::int64_t done = 0; done < count; done += at_once) {
        const std::int64_t n = std::min(at_once, count - done);
        Destination out = rest.rows(done, n, kept);
        out.ids = ids.data();
        out.logprobs = logprobs.data();
        out.k_eff = k_eff.data();
        decode_fixed(layout, block, tokens, first + done, out);
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t k = k_eff[static_cast<std::size_t>(i)];
            columns.check(ids.data() + i * kept, k, first + done + i, layout.vocab_size);
            if (rest.k_eff) rest.k_eff[done + i] = static_cast<std::int32_t>(k);
        }
    }
}

void take(std::vector<std::byte>& out, const std::byte* from, std::int64_t bytes) {
    out.insert(out.end(), from, from + bytes);
}

}  // namespace

void pack(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
          std::int64_t count, const Packed& out, std::int64_t row) {
    if (layout.codec != Codec::fixed) throw ArgumentError("only blocks of the fixed codec can be packed");
    if (first < 0 || count < 0 || count > tokens - first) throw ArgumentError("tokens beyond the block");
    check(layout, block, tokens, first, count, out.rest.rows(row, count, layout.kept));

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
    for (std::int64_t i = 0; i < first + count; ++i) {
        const std::int64_t k = widths[i], of_ids = id_bytes(k, bits), of_deltas = delta_bytes(k);
        const std::byte* behind = skip_escapes(escapes, end, kernels.count_escapes(deltas, of_deltas));
        if (i >= first) {
            const std::int64_t at = row + i - first;
            std::vector<std::byte>& data = *out.data;
            if (data.size() / 4 > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
                throw ArgumentError("a sample of more than 2^33 bytes");
            out.offset[at] = static_cast<std::int32_t>(data.size() / 4);
            out.top[at] = load<float>(tops + 4 * i);
            take(data, ids, of_ids);
            take(data, deltas, of_deltas);
            take(data, escapes, behind - escapes);
            data.resize((data.size() + 3) / 4 * 4);
        }
        ids += of_ids;
        deltas += of_deltas;
        escapes = behind;
    }
}

namespace {

void unpack_token(const Layout& layout, const PackedSource& packed, std::int64_t token, std::int32_t* ids,
                  float* logprobs) {
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
    switch (cpu::kernels().cache->decode_fixed(row)) {
        case Broken::none:
            return;
        case Broken::id:
            return wrong("has an id that is not below " + std::to_string(layout.vocab_size));
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
    parallel_for((packed.tokens + together - 1) / together, threads, [&](std::int64_t part) {
        for (std::int64_t i = part * together; i < std::min(packed.tokens, (part + 1) * together); ++i)
            unpack_token(layout, packed, i, ids + i * layout.kept, logprobs + i * layout.kept);
    });
}

}  // namespace kdfast::cache
