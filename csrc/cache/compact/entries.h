// The entries of compact rows, as kernels read them (FORMAT.md, section 6.2).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cache/broken.h"
#include "cache/compact/lanes.h"
#include "cache/compact/model.h"
#include "core/inline.h"

namespace kdfast::cache {

// A symbol as a decoder needs it: its first slot, and base << 6 | raw.
struct DecodedSymbol {
    std::uint32_t base_raw = 0;
    std::uint16_t frequency = 0;
    std::uint16_t start = 0;
};

// What a slot of an alphabet of precision P says of the state behind it, so that no state waits for more than one load:
// the symbol's frequency - 1 in the lowest P bits, the slot's place in the symbol in the P bits above, then the number
// of raw bits; of a delta, from bit history_bit on, also the history that it is to the next one.
inline constexpr unsigned history_bit = 27;
template <unsigned bits>
struct Transition {
    static constexpr std::uint32_t mask = (1u << bits) - 1;
    static constexpr unsigned raw_bit = 2 * bits;
};
static_assert(Transition<id_precision>::raw_bit + 6 == 32 && Transition<precision>::raw_bit + 5 == history_bit);

// A lane of a block: its state, and where its next word is.
struct LaneReader {
    std::uint64_t state = 0;
    const std::byte* at = nullptr;
    const std::byte* end = nullptr;

    // The load is legal behind the end too: whoever reads checks after at most words_between_checks of them.
    KDFAST_INLINE void refill() {
        std::uint32_t word;
        std::memcpy(&word, at, sizeof word);
        // As arithmetic: a branch would be mispredicted about once for two entries.
        const std::uint64_t low = state < lane_start;
        state = state << (low * 32) | (word & (0 - low));
        at += low * sizeof word;
    }
    // Of an alphabet of which slots say the symbol.
    KDFAST_INLINE DecodedSymbol symbol(const std::uint16_t* slots, const DecodedSymbol* symbols) {
        const auto slot = static_cast<std::uint32_t>(state & ((1u << precision) - 1));
        const DecodedSymbol found = symbols[slots[slot]];
        state = found.frequency * (state >> precision) + slot - found.start;
        refill();
        return found;
    }
    KDFAST_INLINE std::uint32_t raw(std::uint32_t bits) {
        const auto value = static_cast<std::uint32_t>(state & ((std::uint64_t{1} << bits) - 1));
        state >>= bits;
        refill();
        return value;
    }
};

// Rows that are read at the same time, each from a lane of its own: a lane waits for its own state alone, so that the
// others fill the time.
struct CompactEntries {
    static constexpr std::size_t most = 8 * lanes;  // those of eight blocks

    // Of each slot of context c, from c << precision on: its transition, and its value or, with raw bits, their base.
    const std::uint32_t* delta_transitions = nullptr;
    const std::uint32_t* delta_values = nullptr;  // and 0 at no_delta
    const std::uint32_t* listed = nullptr;        // at least one, whatever their number
    std::uint32_t listed_count = 0;
    std::uint32_t vocab_size = 0;
    float step = 0;  // 2^-grid

    std::size_t rows = 0;  // at most `most`
    std::uint64_t state[most] = {};
    const std::byte* at[most] = {};  // the next word; up to padding_after_block bytes behind the end may be loaded
    const std::byte* end[most] = {};
    const std::uint32_t* transitions[most] = {};  // of the class of ids
    const std::uint32_t* values[most] = {};       // a listed id without raw bits is listed_count more than itself
    std::uint32_t count[most] = {};               // of entries
    float top[most] = {};
    std::int32_t* ids[most] = {};  // of which `count` are written; null: nobody asks
    float* logprobs[most] = {};    // as ids
};

// What lanes have read of an entry: the raw bits of the id, its slot, and the place of the delta's slot in all
// contexts. A delta with raw bits is large_delta more than its place among those that were put aside.
inline constexpr unsigned record_slot = 32, record_delta = record_slot + id_precision;
inline constexpr std::uint64_t no_delta = delta_contexts << precision, large_delta = 1 << 17;  // no_delta: of entry 0
static_assert(no_delta < large_delta);

// The rows' entries, four lanes at a time; states and words move on. Broken::words: a lane ends too early.
Broken decode_entries(CompactEntries& entries);

}  // namespace kdfast::cache
