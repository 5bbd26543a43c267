// A block decoder from FORMAT.md alone, bit by bit, that refuses what the document forbids: what the codec's tests hold
// it to.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cache/codec.h"

namespace kdfast::test {

struct Illegal {};

inline void demand(bool holds) {
    if (!holds) throw Illegal{};
}

// What a block holds, as memory holds it: rows of K entries.
struct Decoded {
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> logprobs, mass, lse, gold, neg_entropy;

    bool operator==(const Decoded& other) const {
        const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {  // -0 is not 0
            return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
        };
        return ids == other.ids && k_eff == other.k_eff && same(logprobs, other.logprobs) && same(mass, other.mass) &&
               same(lse, other.lse) && same(gold, other.gold) && same(neg_entropy, other.neg_entropy);
    }
    // The tokens from `first` on, of n.
    Decoded part(std::size_t first, std::size_t count, std::size_t n) const {
        Decoded out;
        const auto cut = [&](const auto& from, auto& to) {
            const std::size_t width = from.size() / n;
            to.assign(from.begin() + static_cast<std::ptrdiff_t>(first * width),
                      from.begin() + static_cast<std::ptrdiff_t>((first + count) * width));
        };
        cut(ids, out.ids), cut(k_eff, out.k_eff), cut(logprobs, out.logprobs), cut(mass, out.mass);
        cut(gold, out.gold), cut(neg_entropy, out.neg_entropy);
        for (std::size_t t = 0; t < lse.size() / n; ++t)
            out.lse.insert(out.lse.end(), lse.begin() + static_cast<std::ptrdiff_t>(t * n + first),
                           lse.begin() + static_cast<std::ptrdiff_t>(t * n + first + count));
        return out;
    }
};

inline bool is_plus_zero(float x) { return x == 0 && !std::signbit(x); }

class PlainReader {
  public:
    explicit PlainReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

    unsigned bit() {
        demand(at_ / 8 < bytes_.size());
        const unsigned b = std::to_integer<unsigned>(bytes_[at_ / 8]) >> at_ % 8 & 1;
        ++at_;
        return b;
    }
    std::uint64_t bits(unsigned count) {
        std::uint64_t value = 0;
        for (unsigned j = 0; j < count; ++j) value |= std::uint64_t{bit()} << j;
        return value;
    }
    float f32() { return std::bit_cast<float>(static_cast<std::uint32_t>(bits(32))); }
    std::uint64_t zeros() {
        std::uint64_t n = 0;
        while (bit() == 0) ++n;
        return n;
    }
    std::uint64_t golomb(unsigned order) {
        const std::uint64_t b = zeros();
        demand(b <= 24);
        const std::uint64_t h = (std::uint64_t{1} << b) + bits(static_cast<unsigned>(b));
        return ((h - 1) << order) + bits(order);
    }
    void whole_byte() {
        while (at_ % 8 != 0) demand(bit() == 0);
    }
    void end() {  // zero padding to a multiple of 8 bytes
        while (at_ % 64 != 0) demand(bit() == 0);
        demand(at_ / 8 == bytes_.size());
    }

  private:
    std::span<const std::byte> bytes_;
    std::size_t at_ = 0;
};

inline void plain_widths(const cache::Layout& layout, PlainReader& in, std::size_t n, unsigned bits, Decoded& out) {
    for (std::size_t i = 0; i < n; ++i) {
        out.k_eff.push_back(static_cast<std::int32_t>(layout.ragged ? in.bits(bits) : layout.kept));
        demand(static_cast<std::uint32_t>(out.k_eff[i]) <= layout.kept);
    }
}

inline Decoded plain_fixed(const cache::Layout& layout, PlainReader in, std::size_t n) {
    Decoded out;
    std::vector<float> tops;
    for (std::size_t i = 0; i < n; ++i) tops.push_back(in.f32());
    for (std::size_t i = 0; i < n * layout.temperatures.size(); ++i) {
        out.lse.push_back(in.f32());
        demand(std::isfinite(out.lse.back()));
    }
    for (std::size_t i = 0; i < n && layout.gold; ++i) {
        out.gold.push_back(in.f32());
        demand(out.gold.back() <= 0);
    }
    plain_widths(layout, in, n, 16, out);
    unsigned bits = 1;
    while (std::uint64_t{1} << bits < layout.vocab_size) ++bits;
    std::vector<std::uint64_t> deltas;
    for (std::size_t i = 0; i < n; ++i) {
        const auto k = static_cast<std::size_t>(out.k_eff[i]);
        for (std::size_t j = 0; j < layout.kept; ++j) {
            out.ids.push_back(j < k ? static_cast<std::int32_t>(in.bits(bits)) : -1);
            demand(j >= k || static_cast<std::uint32_t>(out.ids.back()) < layout.vocab_size);
        }
        in.whole_byte();
        demand(std::isfinite(tops[i]) && tops[i] <= 0 && (k > 0 || is_plus_zero(tops[i])));
    }
    for (std::size_t i = 0; i < n; ++i) {
        for (std::int32_t j = 1; j < out.k_eff[i]; ++j) deltas.push_back(in.bits(4));
        in.whole_byte();
    }
    std::size_t next = 0;
    for (std::size_t i = 0; i < n; ++i) {
        std::uint64_t steps = 0;
        for (std::size_t j = 0; j < layout.kept; ++j) {
            if (j >= static_cast<std::size_t>(out.k_eff[i])) {
                out.logprobs.push_back(-INFINITY);
                continue;
            }
            if (j > 0) {
                std::uint64_t delta = deltas[next++];
                if (delta == 15) {
                    const std::uint64_t e = in.bits(8);
                    delta = e < 255 ? 15 + e : in.bits(32);
                    demand(e < 255 || delta >= 270);
                }
                steps += delta;
                demand(steps < 1 << 24);
            }
            const float below =
                static_cast<float>(std::ldexp(static_cast<double>(steps), -static_cast<int>(layout.grid)));
            out.logprobs.push_back(tops[i] - below);
        }
    }
    in.end();
    return out;
}

inline Decoded plain_drawn(const cache::Layout& layout, PlainReader in, std::size_t n) {
    Decoded out;
    const bool pps = layout.method == cache::Method::pps;
    std::vector<float> steps;
    for (std::size_t i = 0; i < n; ++i) {
        out.neg_entropy.push_back(in.f32());
        demand(std::isfinite(out.neg_entropy.back()) && out.neg_entropy.back() <= 0);
    }
    for (std::size_t i = 0; i < n * layout.temperatures.size(); ++i) {
        out.lse.push_back(in.f32());
        demand(std::isfinite(out.lse.back()));
    }
    for (std::size_t i = 0; i < n && pps; ++i) steps.push_back(in.f32());
    for (std::size_t i = 0; i < n && layout.gold; ++i) {
        out.gold.push_back(in.f32());
        demand(out.gold.back() <= 0);
    }
    plain_widths(layout, in, n, layout.kept <= 255 ? 8 : 16, out);
    const auto gaps = static_cast<unsigned>(in.bits(8)), values = static_cast<unsigned>(in.bits(8));
    demand(gaps <= 23 && values <= 23);
    for (std::size_t i = 0; i < n; ++i) {
        const auto k = static_cast<std::size_t>(out.k_eff[i]);
        if (pps) demand(k == 0 ? is_plus_zero(steps[i]) : steps[i] > 0 && std::isfinite(steps[i]));
        std::uint64_t next = 0;
        double drawn = 0;
        for (std::size_t j = 0; j < layout.kept; ++j) {
            if (j >= k) {
                out.ids.push_back(-1);
                out.mass.push_back(0);
                continue;
            }
            const std::uint64_t id = next + in.golomb(gaps);
            demand(id < layout.vocab_size);
            next = id + 1;
            const std::uint64_t value = in.bit() == 1 ? in.golomb(values) + 1 : 0;
            demand(value < 1 << 24);
            const auto v = static_cast<double>(value);
            drawn += v + 1;
            demand(pps ? std::ldexp(v, -static_cast<int>(layout.grid)) <= 104 : drawn <= layout.draws);
            const double mass =
                pps ? (value == 0 ? 1 : std::exp(std::ldexp(v, -static_cast<int>(layout.grid)))) * steps[i]
                    : (v + 1) / layout.draws;
            demand(std::isfinite(static_cast<float>(mass)));
            out.ids.push_back(static_cast<std::int32_t>(id));
            out.mass.push_back(static_cast<float>(mass));
        }
    }
    in.whole_byte();
    in.end();
    return out;
}

inline Decoded plain_decode(const cache::Layout& layout, std::span<const std::byte> block, std::size_t n) {
    return layout.codec == cache::Codec::fixed ? plain_fixed(layout, PlainReader(block), n)
                                               : plain_drawn(layout, PlainReader(block), n);
}

}  // namespace kdfast::test
