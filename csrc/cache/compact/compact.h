// Compact blocks: what the fixed tier stores, entropy coded with a model (FORMAT.md, section 6.2). Integers in, the
// same integers out: quantisation is the fixed tier's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/codec.h"
#include "cache/compact/model.h"

namespace kdfast::cache {

// Quantised targets of some tokens, one row of K entries a token. Entries of a row from k_eff on are 0 when decoded,
// and are not looked at when encoded.
template <class Number, class Float, class Count>
struct QuantisedTargets {
    std::int64_t tokens = 0;
    Number* ids = nullptr;        // (tokens, K), by falling probability
    Number* steps = nullptr;      // (tokens, K): 0 for entry 0, never falling, below 2^24
    Float* top = nullptr;         // (tokens)
    Float* lse = nullptr;         // (temperatures other than 1, lse_stride)
    std::int64_t lse_stride = 0;  // of one temperature to the next, >= tokens
    Float* gold = nullptr;        // (tokens); not looked at where the layout has none
    Count* k_eff = nullptr;       // (tokens); not looked at where the layout is not ragged
};
using QuantisedSource = QuantisedTargets<const std::uint32_t, const float, const std::uint16_t>;
using QuantisedDestination = QuantisedTargets<std::uint32_t, float, std::uint16_t>;

// A symbol as a decoder needs it: its first slot, and base << 6 | raw.
struct DecodedSymbol {
    std::uint32_t base_raw = 0;
    std::uint16_t frequency = 0;
    std::uint16_t start = 0;
};

template <class Index>
struct DecodingTable {
    std::vector<Index> slots;  // slot to symbol
    std::vector<DecodedSymbol> symbols;
};

class CompactDecoder {
  public:
    explicit CompactDecoder(const Model& model);

    // The tokens [first, first + out.tokens) of a block of `tokens`, under the terms of decode() of codec.h. What comes
    // after the last token asked for is not looked at. May be called from several threads.
    void decode(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
                const QuantisedDestination& out) const;

  private:
    friend class CompactReading;

    std::uint32_t vocab_size_;
    std::vector<std::uint32_t> listed_;
    DecodingTable<std::uint16_t> classes_, kept_, top_, gold_;
    std::vector<DecodingTable<std::uint16_t>> lse_, ids_;
    // Of context c from c << precision and from c most_delta_symbols on.
    std::vector<std::uint8_t> delta_slots_;
    std::vector<DecodedSymbol> delta_symbols_;
};

// A symbol as an encoder needs it.
struct EncodedSymbol {
    std::uint32_t base = 0;
    std::uint16_t frequency = 0;
    std::uint16_t start = 0;
    std::uint32_t raw = 0;
};

struct EncodingTable {
    std::vector<EncodedSymbol> symbols;
    std::vector<std::uint16_t> of;  // value, in the units of bases, to symbol; the escape for those beyond
    std::uint16_t escape = 0;

    const EncodedSymbol& operator[](std::uint32_t value) const {
        return symbols[value < of.size() ? of[value] : escape];
    }
};

class CompactEncoder {
  public:
    // Throws ArgumentError for a model in which some value has no symbol.
    explicit CompactEncoder(const Model& model);

    // Appends one block of at most 256 tokens. Throws ArgumentError for values that the format cannot hold, naming the
    // token. May be called from several threads.
    void encode(const Layout& layout, const QuantisedSource& rows, std::vector<std::byte>& out) const;

  private:
    friend class CompactWriting;

    std::uint32_t vocab_size_, listed_;
    std::size_t classes_;               // rounded up to whole vectors: the row length of the two tables below
    std::vector<std::uint16_t> ranks_;  // id to rank, or listed_
    std::vector<std::uint16_t> costs_;  // (ranks and the escape, classes), in 1/16 bit
    std::vector<std::uint16_t> symbols_of_;
    std::vector<std::uint16_t> class_costs_;
    EncodingTable class_, kept_, top_, gold_;
    std::vector<EncodingTable> lse_;
    std::vector<EncodingTable> deltas_;
    std::vector<std::vector<EncodedSymbol>> ids_;
};

}  // namespace kdfast::cache
