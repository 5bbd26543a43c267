// The model of compact blocks: the frequencies that their entropy code stands on (FORMAT.md, sections 6.2 and 6.4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kdfast::cache {

// A part of an alphabet: the 2^raw values from base on share one symbol, and raw bits say which of them is meant.
struct Symbol {
    std::uint32_t base = 0;
    std::uint16_t frequency = 0;  // of 2^precision
    std::uint8_t raw = 0;
};
// By rising base; the frequencies of an alphabet sum to 2^precision, and a symbol's slots follow those before it.
using Alphabet = std::vector<Symbol>;

inline constexpr unsigned id_precision = 13;
inline constexpr unsigned precision = 11;  // of every other alphabet
inline constexpr unsigned float_raw = 20;  // an alphabet of floats is about their 12 high bits
inline constexpr std::uint32_t most_classes = 64;
inline constexpr std::uint32_t most_listed = 65535;
inline constexpr std::size_t most_model_bytes = std::size_t{1} << 24;

inline constexpr std::uint32_t delta_places = 10, delta_histories = 4;
inline constexpr std::uint32_t delta_contexts = delta_places * delta_histories;
inline constexpr std::size_t most_delta_symbols = 256;

// Of entry i >= 1: where in the row it stands.
[[gnu::always_inline]] constexpr std::uint32_t delta_place(std::uint32_t i) {
    constexpr std::array<std::uint8_t, 33> first = {0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5,
                                                    6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7};
    return i <= 32 ? first[i] : i <= 64 ? 8 : 9;
}
// Of the delta before it, 0 for entry 1.
[[gnu::always_inline]] constexpr std::uint32_t delta_history(std::uint32_t before) {
    return static_cast<std::uint32_t>(before > 0) + static_cast<std::uint32_t>(before > 1) +
           static_cast<std::uint32_t>(before > 3);
}

struct Model {
    std::uint32_t vocab_size = 0;
    // An id's rank is its place here. In the alphabets of ids a value below listed.size() is a rank, one from there on
    // is listed.size() more than the id itself.
    std::vector<std::uint32_t> listed;
    Alphabet classes, kept, top, gold;
    std::vector<Alphabet> lse;  // one for each captured temperature other than 1
    std::array<Alphabet, delta_contexts> deltas;
    std::vector<Alphabet> ids;  // one for each class of rows

    unsigned id_bits() const;
};

// The payload of a model frame.
std::vector<std::byte> serialise(const Model& model);
// Throws Fault (corrupt) for what FORMAT.md forbids, or for another vocabulary or number of temperatures.
Model parse_model(std::span<const std::byte> payload, std::uint32_t vocab_size, std::size_t temperatures);

}  // namespace kdfast::cache
