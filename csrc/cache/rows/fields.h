// What the codecs have in common: the fields with one number a token, and how an entry is named in an error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "cache/bytes.h"
#include "cache/codec.h"
#include "core/error.h"

namespace kdfast::cache {

[[noreturn]] inline void refuse(std::int64_t token, const std::string& what) {
    throw ArgumentError("token " + std::to_string(token) + ": " + what);
}
[[noreturn]] inline void refuse(std::int64_t token, std::int64_t entry, const std::string& what) {
    refuse(token, "entry " + std::to_string(entry) + ": " + what);
}

inline bool finite_log(float x) { return (x <= 0) & (x >= std::numeric_limits<float>::lowest()); }

// A section of one f32 a token: the asked tokens' values, checked, to `to` unless that is null. Without a branch on a
// value, which a compiler could not make wide.
template <class Legal>
void read_floats(const std::byte* section, std::int64_t first, std::int64_t count, float* to, const char* what,
                 Legal legal) {
    const auto at = [section, first](std::int64_t i) { return load<float>(section + 4 * (first + i)); };
    unsigned illegal = 0;
    for (std::int64_t i = 0; i < count; ++i) illegal |= !legal(at(i));
    for (std::int64_t i = 0; illegal != 0 && i < count; ++i)
        if (!legal(at(i))) corrupt(std::string("a block has a ") + what + " of " + std::to_string(at(i)));
    if (to && count > 0) std::memcpy(to, section + 4 * first, static_cast<std::size_t>(4 * count));
}

// The k_eff of all of a block's tokens.
class Widths {
  public:
    Widths(const Layout& layout, const Source& t) : kept_(layout.kept) {
        if (!layout.ragged) return;
        if (!t.k_eff) throw ArgumentError("a ragged layout needs k_eff");
        for (std::int64_t i = 0; i < t.tokens; ++i) {
            if (t.k_eff[i] < 0 || t.k_eff[i] > kept_)
                refuse(i, "k_eff is " + std::to_string(t.k_eff[i]) + ", not 0 to " + std::to_string(kept_));
            own_.push_back(static_cast<std::uint16_t>(t.k_eff[i]));
        }
    }
    Widths(const Layout& layout, Sections& sections, std::int64_t tokens, bool narrow) : kept_(layout.kept) {
        if (!layout.ragged) return;
        const std::byte* at = sections.take(tokens * (narrow ? 1 : 2), "k_eff");
        for (std::int64_t i = 0; i < tokens; ++i) {
            own_.push_back(narrow ? std::to_integer<std::uint16_t>(at[i]) : load<std::uint16_t>(at + 2 * i));
            if (own_.back() > kept_)
                corrupt("a token has " + std::to_string(own_.back()) + " entries, more than " + std::to_string(kept_));
        }
    }

    std::int64_t operator[](std::int64_t i) const { return own_.empty() ? kept_ : own_[static_cast<std::size_t>(i)]; }
    // Their own, or null where each token has K.
    const std::uint16_t* data() const { return own_.empty() ? nullptr : own_.data(); }

  private:
    std::int64_t kept_;
    std::vector<std::uint16_t> own_;
};

inline void append_gold(const Source& t, std::vector<std::byte>& out) {
    for (std::int64_t i = 0; i < t.tokens; ++i) append(out, t.gold[i]);
}

inline void read_gold(const std::byte* section, std::int64_t first, const Destination& out) {
    read_floats(section, first, out.tokens, out.gold, "gold", [](float x) { return x <= 0; });
}

inline bool finite(float x) { return std::abs(x) <= std::numeric_limits<float>::max(); }

// Where the sections of the lse are, and their values out of there.
inline void read_lse(const Layout& layout, Sections& sections, std::int64_t tokens, std::int64_t first,
                     const Destination& out) {
    for (std::size_t t = 0; t < layout.temperatures.size(); ++t)
        read_floats(sections.take(4 * tokens, "lse"), first, out.tokens,
                    out.lse ? out.lse + static_cast<std::int64_t>(t) * out.lse_stride : nullptr, "lse", finite);
}

inline void fill_k_eff(const Widths& widths, std::int64_t first, const Destination& out) {
    if (!out.k_eff) return;
    for (std::int64_t i = 0; i < out.tokens; ++i) out.k_eff[i] = static_cast<std::int32_t>(widths[first + i]);
}

// What is left of a block after its last section: the fewest zero bytes that make its length a multiple of 8.
inline void check_padding(const std::byte* from, std::span<const std::byte> block) {
    const auto left = static_cast<std::size_t>(block.data() + block.size() - from);
    if (left >= 8 || block.size() % 8 != 0) corrupt("a block is longer than what it holds");
    for (std::size_t i = 0; i < left; ++i)
        if (from[i] != std::byte{0}) corrupt("a block's padding is not zero");
}

// Which columns the entries of a row have: a byte for each says in which row it was last, so that nothing is cleared,
// and no entry waits for the one before it.
class Columns {
  public:
    // The first entry whose id, all below vocab_size, one before it has, or -1.
    std::int64_t twice(const std::int32_t* ids, std::int64_t count, std::uint32_t vocab_size) {
        if (last_.size() < vocab_size) last_.resize(vocab_size);
        if (++row_ == 0) {
            std::ranges::fill(last_, std::uint8_t{0});
            row_ = 1;
        }
        std::uint8_t* const last = last_.data();
        const std::uint8_t row = row_;
        bool found = false;
        for (std::int64_t i = 0; i < count; ++i) {
            std::uint8_t& its = last[static_cast<std::uint32_t>(ids[i])];
            found |= its == row;
            its = row;
        }
        for (std::int64_t i = 1; found && i < count; ++i)
            if (std::find(ids, ids + i, ids[i]) != ids + i) return i;
        return -1;
    }

  private:
    std::vector<std::uint8_t> last_;
    std::uint8_t row_ = 0;
};

}  // namespace kdfast::cache
