// Compact blocks: what the fixed tier stores, entropy coded with a model (FORMAT.md, section 6.2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/codec.h"
#include "cache/compact/entries.h"
#include "cache/compact/model.h"

namespace kdfast::cache {

// Quantised targets of some tokens, one row of K entries a token, of which those from k_eff on are not looked at.
struct QuantisedSource {
    std::int64_t tokens = 0;
    const std::uint32_t* ids = nullptr;    // (tokens, K), by falling probability
    const std::uint32_t* steps = nullptr;  // (tokens, K): 0 for entry 0, never falling, below 2^24
    const float* top = nullptr;            // (tokens)
    const float* lse = nullptr;            // (temperatures other than 1, lse_stride)
    std::int64_t lse_stride = 0;           // of one temperature to the next, >= tokens
    const float* gold = nullptr;           // (tokens); not looked at where the layout has none
    const std::uint16_t* k_eff = nullptr;  // (tokens); not looked at where the layout is not ragged
};

struct DecodingTable {
    std::vector<std::uint16_t> slots;  // slot to symbol
    std::vector<DecodedSymbol> symbols;
};

// Of each slot what CompactEntries says.
struct EntryTable {
    std::vector<std::uint32_t> transitions, values;
};

inline constexpr std::size_t most_together = CompactEntries::most / lanes;

class CompactDecoder {
  public:
    explicit CompactDecoder(const Model& model);

    // Of each of up to most_together blocks what decode() of codec.h would give; they are read at the same time, which
    // is faster than one after the other. What comes after the last token asked for is not looked at. A Fault says
    // nothing of which block it is about. May be called from several threads.
    void decode(const Layout& layout, std::span<const DecodeRequest> blocks) const;

  private:
    friend class CompactReading;

    std::uint32_t vocab_size_;
    std::vector<std::uint32_t> listed_;  // and one more
    DecodingTable classes_, kept_, top_, gold_;
    std::vector<DecodingTable> lse_;
    EntryTable deltas_;            // of all contexts, end to end, and no_delta
    std::vector<EntryTable> ids_;  // of each class
};

// A symbol as an encoder of precision P needs it. A state x that is at most `most`, frequency 2^(64-P) - 1, becomes
// x + start + q (2^P - frequency), with q the upper half of x times reciprocal, shifted, which is floor(x / frequency).
// Of frequency 1 it is one less, and start is as much more.
struct EncodedSymbol {
    std::uint64_t reciprocal = 0;
    std::uint64_t most = 0;
    std::uint32_t base = 0;
    std::uint16_t start = 0;
    std::uint16_t others = 0;  // 2^P - frequency
    std::uint8_t shift = 0;
    std::uint8_t raw = 0;
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
    std::size_t classes_;                    // rounded up to whole vectors: the row length of costs_
    std::vector<std::uint16_t> ranks_;       // id to rank, or listed_
    std::vector<std::uint16_t> costs_;       // (ranks and the escape, classes), in 1/16 bit
    std::vector<std::uint16_t> symbols_of_;  // (classes, ranks and the escape)
    std::vector<std::uint16_t> class_costs_;
    EncodingTable class_, kept_, top_, gold_;
    std::vector<EncodingTable> lse_;
    std::vector<EncodingTable> deltas_;
    std::vector<std::vector<EncodedSymbol>> ids_;
};

}  // namespace kdfast::cache
