#include "cache/compact/block.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cache/kernels.h"
#include "cache/rows/fields.h"

namespace kdfast::cache {

QuantisedRows::QuantisedRows(const Layout& layout, std::int64_t tokens)
    : tokens_(tokens),
      ids_(static_cast<std::size_t>(tokens) * layout.kept),
      steps_(ids_.size()),
      top_(static_cast<std::size_t>(tokens)),
      lse_(layout.temperatures.size() * top_.size()),
      gold_(layout.gold ? top_.size() : 0),
      k_eff_(layout.ragged ? top_.size() : 0) {}

QuantisedSource QuantisedRows::source() const {
    return {.tokens = tokens_,
            .ids = ids_.data(),
            .steps = steps_.data(),
            .top = top_.data(),
            .lse = lse_.data(),
            .lse_stride = tokens_,
            .gold = gold_.data(),
            .k_eff = k_eff_.data()};
}

QuantisedRows QuantisedRows::of_fixed(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens) {
    QuantisedRows rows(layout, tokens);
    Sections sections(block);
    const auto copy = [&](auto& to, const char* what) {
        const auto bytes = static_cast<std::int64_t>(to.size() * sizeof to[0]);
        if (bytes > 0) std::memcpy(to.data(), sections.take(bytes, what), static_cast<std::size_t>(bytes));
    };
    copy(rows.top_, "top");
    copy(rows.lse_, "lse");
    copy(rows.gold_, "gold");
    copy(rows.k_eff_, "k_eff");
    const auto width = [&](std::size_t i) -> std::int64_t { return layout.ragged ? rows.k_eff_[i] : layout.kept; };
    const unsigned bits = layout.id_bits();
    std::int64_t of_ids = 0, of_deltas = 0;
    for (std::size_t i = 0; i < rows.top_.size(); ++i) {
        of_ids += id_bytes(width(i), bits);
        of_deltas += delta_bytes(width(i));
    }
    const std::byte* ids = sections.take(of_ids, "ids");
    const std::byte* deltas = sections.take(of_deltas, "deltas");
    const std::span<const std::byte> escapes = sections.rest();
    std::size_t escape = 0;
    for (std::size_t i = 0; i < rows.top_.size(); ++i) {
        const auto k = static_cast<std::size_t>(width(i));
        std::uint32_t* row_ids = rows.ids_.data() + i * layout.kept;
        std::uint32_t* row_steps = rows.steps_.data() + i * layout.kept;
        std::uint64_t word = 0;
        unsigned filled = 0;
        for (std::size_t j = 0; j < k; ++j) {
            for (; filled < bits; filled += 8) word |= std::to_integer<std::uint64_t>(*ids++) << filled;
            row_ids[j] = static_cast<std::uint32_t>(word & ((std::uint64_t{1} << bits) - 1));
            word >>= bits;
            filled -= bits;
        }
        for (std::size_t j = 1; j < k; ++j) {
            auto delta = std::to_integer<std::uint32_t>(deltas[(j - 1) / 2]) >> (j - 1) % 2 * 4 & 15;
            if (delta == delta_escaped) {
                const unsigned e = load<std::uint8_t>(escapes, escape);
                delta = e < escape_escaped ? delta_escaped + e : load<std::uint32_t>(escapes, escape + 1);
                escape += e < escape_escaped ? 1 : 5;
            }
            row_steps[j] = row_steps[j - 1] + delta;
        }
        deltas += delta_bytes(width(i));
    }
    return rows;
}

}  // namespace kdfast::cache
