// Room for decoded tokens that nobody asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache/codec.h"

namespace kdfast::cache {

class Scratch {
  public:
    // Of a block's tokens, with all fields that the layout has.
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

}  // namespace kdfast::cache
