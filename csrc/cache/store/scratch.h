// Room for decoded tokens that nobody asked for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache/codec.h"

namespace kdfast::cache {

class Scratch {
  public:
    // Of some tokens, with all fields that the layout has.
    Destination rows(const Layout& layout, std::int64_t tokens) {
        const auto n = static_cast<std::size_t>(tokens), entries = n * layout.kept;
        fit(ids_, entries);
        fit(values_, entries);
        fit(lse_, n * layout.temperatures.size());
        fit(k_eff_, n);
        fit(gold_, n);
        fit(neg_entropy_, n);
        const bool drawn = layout.codec == Codec::drawn;
        return {.tokens = tokens,
                .ids = ids_.data(),
                .logprobs = drawn ? nullptr : values_.data(),
                .mass = drawn ? values_.data() : nullptr,
                .lse = lse_.data(),
                .lse_stride = tokens,
                .k_eff = layout.ragged ? k_eff_.data() : nullptr,
                .gold = layout.gold ? gold_.data() : nullptr,
                .neg_entropy = drawn ? neg_entropy_.data() : nullptr};
    }

  private:
    // What a block of unusual width has taken does not stay.
    template <class T>
    static void fit(std::vector<T>& values, std::size_t count) {
        constexpr std::size_t usual = std::size_t{1} << 18;
        if (values.size() > usual && count <= usual) std::vector<T>().swap(values);
        if (values.size() < count) values.resize(count);
    }

    std::vector<std::int32_t> ids_, k_eff_;
    std::vector<float> values_, lse_, gold_, neg_entropy_;
};

// What of these rows somebody asks for.
inline void copy(const Layout& layout, const Destination& rows, const Destination& to) {
    const auto some = [](const auto* from, auto* into, std::int64_t count) {
        if (from && into) std::copy_n(from, count, into);
    };
    const std::int64_t entries = rows.tokens * layout.kept;
    some(rows.ids, to.ids, entries);
    some(rows.logprobs, to.logprobs, entries);
    some(rows.mass, to.mass, entries);
    for (std::size_t t = 0; to.lse && t < layout.temperatures.size(); ++t)
        some(rows.lse + static_cast<std::int64_t>(t) * rows.lse_stride,
             to.lse + static_cast<std::int64_t>(t) * to.lse_stride, rows.tokens);
    some(rows.k_eff, to.k_eff, rows.tokens);
    if (to.k_eff && !rows.k_eff) std::fill_n(to.k_eff, rows.tokens, static_cast<std::int32_t>(layout.kept));
    some(rows.gold, to.gold, rows.tokens);
    some(rows.neg_entropy, to.neg_entropy, rows.tokens);
}

}  // namespace kdfast::cache
