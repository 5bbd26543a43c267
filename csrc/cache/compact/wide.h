// Entries of compact rows, a lane in each 64 bits of a register, where tables are gathered by the processor itself.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cache/kernels.h"
#include "core/inline.h"

namespace kdfast::cpu::KDFAST_ISA {

// How many entries of a row are read before they are put where they belong.
constexpr std::uint32_t tile = 64;

using Numbers [[gnu::vector_size(64)]] = std::uint64_t;
constexpr int in_register = sizeof(Numbers) / 8;

KDFAST_INLINE __m512i of(Numbers x) { return reinterpret_cast<__m512i>(x); }
KDFAST_INLINE Numbers numbers(__m512i x) { return reinterpret_cast<Numbers>(x); }
KDFAST_INLINE Numbers low_product(Numbers a, Numbers b) { return numbers(_mm512_mul_epu32(of(a), of(b))); }
KDFAST_INLINE __mmask8 less(Numbers a, Numbers b) { return _mm512_cmplt_epu64_mask(of(a), of(b)); }
KDFAST_INLINE Numbers chosen(__mmask8 mask, Numbers yes, Numbers no) {
    return numbers(_mm512_mask_mov_epi64(of(no), mask, of(yes)));
}

// What lies at each lane's address: two words, the first in the upper half; and one of 32 bits.
KDFAST_INLINE Numbers words_at(Numbers at) {
    return numbers(_mm512_rol_epi64(_mm512_i64gather_epi64(of(at), nullptr, 1), 32));
}
KDFAST_INLINE Numbers transitions_at(Numbers at) {
    return numbers(_mm512_cvtepu32_epi64(_mm512_i64gather_epi32(of(at), nullptr, 1)));
}

// Lanes of one register.
struct WideLanes {
    Numbers state, at, end, history;

    // Where a state is too small, with the next of the words.
    KDFAST_INLINE __mmask8 refill(Numbers& words) {
        const __mmask8 needs = less(state, Numbers{} + cache::lane_start);
        state = numbers(_mm512_mask_shldi_epi64(of(state), needs, of(state), of(words), 32));
        words = chosen(needs, words << 32, words);
        at = chosen(needs, at + 4, at);
        return needs;
    }
    template <unsigned bits>
    KDFAST_INLINE void move(Numbers transition) {
        using T = cache::Transition<bits>;
        const Numbers quotient = state >> bits, less_one = transition & T::mask;
        const Numbers high = low_product(less_one, state >> (bits + 32));
        state = (low_product(less_one, quotient) + quotient) + ((high << 32) + (transition >> bits & T::mask));
    }
    KDFAST_INLINE Numbers raw(Numbers bits) {
        const Numbers low = state & ~(~Numbers{} << bits);
        state >>= bits;
        return low;
    }
};

// Entries [begin, begin + count) of a row, 16 at a time, whose records lie `stride` apart; `large` are the deltas that
// were put aside. `steps` are those of the entry before, and move on.
template <int stride>
cache::Broken put_row(const cache::CompactEntries& e, std::size_t row, std::uint32_t begin, std::uint32_t count,
                      const std::uint64_t* records, const std::uint32_t* large, std::uint32_t& steps) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(stride * 8)), last = _mm512_set1_epi32(15);
    const __m512i listed = _mm512_set1_epi32(static_cast<int>(e.listed_count));
    const __m512i vocab_size = _mm512_set1_epi32(static_cast<int>(e.vocab_size));
    const __m512 top = _mm512_set1_ps(e.top[row]), step = _mm512_set1_ps(e.step);
    const std::uint32_t* const values = e.values[row];
    __m512i before = _mm512_set1_epi32(static_cast<int>(steps));
    __mmask16 wrong = 0;
    for (std::uint32_t i = 0; i < count; i += 16) {
        const auto there = static_cast<__mmask16>(count - i >= 16 ? 0xFFFFu : (1u << (count - i)) - 1);
        const auto* const from = reinterpret_cast<const std::byte*>(records + std::size_t{i} * stride);
        const __m512i none = _mm512_setzero_si512();
        const __m512i raw = _mm512_mask_i32gather_epi32(none, there, places, from, 1);
        const __m512i high = _mm512_mask_i32gather_epi32(none, there, places, from + 4, 1);

        const __m512i delta = _mm512_srli_epi32(high, cache::record_delta - 32);
        const __mmask16 aside = _mm512_cmpge_epu32_mask(delta, _mm512_set1_epi32(static_cast<int>(cache::large_delta)));
        __m512i sums =
            _mm512_mask_i32gather_epi32(none, static_cast<__mmask16>(there & ~aside), delta, e.delta_values, 4);
        if (aside != 0) [[unlikely]]
            sums = _mm512_mask_i32gather_epi32(
                sums, aside, _mm512_sub_epi32(delta, _mm512_set1_epi32(static_cast<int>(cache::large_delta))), large,
                4);
        const auto add = [&]<int lanes>() KDFAST_INLINE_LAMBDA {
            sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, none, 16 - lanes));
        };
        add.template operator()<1>();
        add.template operator()<2>();
        add.template operator()<4>();
        add.template operator()<8>();
        sums = _mm512_add_epi32(sums, before);
        before = _mm512_permutexvar_epi32(last, sums);
        // Sixteen deltas cannot overflow what was below 2^24 before them.
        if (static_cast<std::uint32_t>(_mm512_cvtsi512_si32(before)) >> 24 != 0) return cache::Broken::steps;

        const __m512i slot = _mm512_and_si512(high, _mm512_set1_epi32((1 << cache::id_precision) - 1));
        const __m512i value = _mm512_add_epi32(_mm512_mask_i32gather_epi32(none, there, slot, values, 4), raw);
        const __mmask16 is_listed = _mm512_mask_cmplt_epu32_mask(there, value, listed);
        const __m512i id = _mm512_mask_i32gather_epi32(_mm512_sub_epi32(value, listed), is_listed, value, e.listed, 4);
        wrong |= _mm512_mask_cmpge_epu32_mask(there, id, vocab_size);
        _mm512_mask_storeu_epi32(e.ids[row] + begin + i, there, id);
        _mm512_mask_storeu_ps(e.logprobs[row] + begin + i, there,
                              _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sums), step, top));  // the product is exact
    }
    steps = static_cast<std::uint32_t>(_mm512_cvtsi512_si32(before));
    return wrong != 0 ? cache::Broken::id : cache::Broken::none;
}

// `registers` registers of lanes, from row `first` on.
template <int registers>
class EntriesWide {
  public:
    EntriesWide(cache::CompactEntries& rows, std::size_t first) : e_(rows), first_(first) {
        for (int l = 0; l < width; ++l) {
            const std::uint32_t count = counts()[l];
            least_ = l == 0 || count < least_ ? count : least_;
            most_ = count > most_ ? count : most_;
        }
        for (int g = 0; g < registers; ++g) lanes_[g] = {load(e_.state, g), load(e_.at, g), load(e_.end, g), Numbers{}};
    }

    cache::Broken run() {
        for (std::uint32_t begin = 0; begin < most_; begin += tile) {
            const std::uint32_t end = most_ - begin < tile ? most_ : begin + tile;
            const std::uint32_t whole = least_ < begin ? begin : least_ < end ? least_ : end;
            larges_ = 0;
            if (!read<false>(begin, begin, whole) || !read<true>(begin, whole, end)) return cache::Broken::words;
            if (const cache::Broken broken = put(begin, end); broken != cache::Broken::none) return broken;
        }
        for (int g = 0; g < registers; ++g) {
            std::memcpy(e_.state + first_ + g * in_register, &lanes_[g].state, sizeof(Numbers));
            std::memcpy(e_.at + first_ + g * in_register, &lanes_[g].at, sizeof(Numbers));
        }
        return cache::Broken::none;
    }

  private:
    static constexpr int width = registers * in_register;

    const std::uint32_t* counts() const { return e_.count + first_; }

    template <class From>
    KDFAST_INLINE Numbers load(const From* from, int g) const {
        static_assert(sizeof(From) == 8);
        Numbers x;
        std::memcpy(&x, from + first_ + g * in_register, sizeof x);
        return x;
    }

    // The entries [from, to) of every row that has them, of all unless `masked`, into the tile that begins at `begin`;
    // whether no lane has ended too early.
    template <bool masked>
    bool read(std::uint32_t begin, std::uint32_t from, std::uint32_t to) {
        WideLanes lanes[registers];
        Numbers tables[registers];
        for (int g = 0; g < registers; ++g) {
            lanes[g] = lanes_[g];
            tables[g] = load(e_.transitions, g);
        }
        for (std::uint32_t i = from; i < to; ++i) {
            const std::uint64_t context = std::uint64_t{cache::delta_place(i) * cache::delta_histories};
            __mmask8 behind = 0;
#pragma GCC unroll 4
            for (int g = 0; g < registers; ++g) {
                WideLanes lane = lanes[g];
                const Numbers record = entry(lane, tables[g], i, context);
                if constexpr (masked) {
                    Numbers has;
                    for (int l = 0; l < in_register; ++l) has[l] = counts()[g * in_register + l];
                    const __mmask8 there = less(Numbers{} + i, has);
                    lane.state = chosen(there, lane.state, lanes[g].state);
                    lane.at = chosen(there, lane.at, lanes[g].at);
                }
                behind |= less(lane.end, lane.at);
                lanes[g] = lane;
                std::memcpy(records_[i - begin] + g * in_register, &record, sizeof record);
            }
            if (behind != 0) [[unlikely]]
                return false;
        }
        for (int g = 0; g < registers; ++g) lanes_[g] = lanes[g];
        return true;
    }

    KDFAST_INLINE Numbers entry(WideLanes& lane, Numbers table, std::uint32_t i, std::uint64_t context) {
        using Delta = cache::Transition<cache::precision>;
        using Id = cache::Transition<cache::id_precision>;
        Numbers from = lane.at, words = words_at(from);
        Numbers record = Numbers{} + (cache::no_delta << cache::record_delta);
        __mmask8 third = 0;
        if (i > 0) {
            Numbers slot = ((lane.history + context) << cache::precision) + (lane.state & Delta::mask);
            const Numbers transition =
                transitions_at(reinterpret_cast<std::uint64_t>(e_.delta_transitions) + (slot << 2));
            lane.move<cache::precision>(transition);
            third = lane.refill(words);
            lane.history = transition >> cache::history_bit;
            const Numbers bits = transition >> Delta::raw_bit & 31;
            if (less(Numbers{}, bits) != 0) [[unlikely]] {
                const Numbers raw = lane.raw(bits);
                lane.refill(words);
                Numbers slots = slot, histories = lane.history;  // whose addresses are taken
                put_aside(slots, bits, raw, histories);
                slot = slots;
                lane.history = histories;
                from = lane.at;
                words = words_at(from);
                third = 0;
            }
            record = slot << cache::record_delta;
        }
        const Numbers slot = lane.state & Id::mask;
        const Numbers transition = transitions_at(table + (slot << 2));
        lane.move<cache::id_precision>(transition);
        third &= lane.refill(words);
        record |= slot << cache::record_slot;
        record |= lane.raw(transition >> Id::raw_bit);
        third &= lane.refill(words);
        // For a third word zeros came.
        if (third != 0) [[unlikely]]
            lane.state |= chosen(third, words_at(from + 8) >> 32, Numbers{});
        return record;
    }

    // The tile's entries [begin, end) to their rows.
    cache::Broken put(std::uint32_t begin, std::uint32_t end) {
        for (int l = 0; l < width; ++l) {
            const std::size_t row = first_ + static_cast<std::size_t>(l);
            const std::uint32_t there = e_.count[row] < end ? e_.count[row] : end;
            if (!e_.ids[row] || there <= begin) continue;
            const cache::Broken broken =
                put_row<width>(e_, row, begin, there - begin, records_[0] + l, large_, steps_[l]);
            if (broken != cache::Broken::none) return broken;
        }
        return cache::Broken::none;
    }

    // Deltas with raw bits, whose slots become their places here.
    [[gnu::noinline]] void put_aside(Numbers& slots, Numbers bits, Numbers raw, Numbers& histories) {
        for (int l = 0; l < in_register; ++l) {
            if (bits[l] == 0) continue;
            const std::uint32_t delta = e_.delta_values[slots[l]] + static_cast<std::uint32_t>(raw[l]);
            histories[l] = cache::delta_history(delta);
            large_[larges_] = delta;
            slots[l] = cache::large_delta + larges_++;
        }
    }

    cache::CompactEntries& e_;
    const std::size_t first_;
    WideLanes lanes_[registers];
    std::uint32_t least_ = 0, most_ = 0, larges_ = 0;
    std::uint32_t steps_[width] = {};
    alignas(64) std::uint64_t records_[tile][width];
    std::uint32_t large_[tile * width];
};

// Rows from `first` on, in the fewest registers that hold them.
template <int registers>
cache::Broken decode_compact(cache::CompactEntries& e, std::size_t first) {
    if constexpr (registers > 1)
        if (e.rows - first <= std::size_t{registers / 2 * in_register}) return decode_compact<registers / 2>(e, first);
    return EntriesWide<registers>(e, first).run();
}

inline cache::Broken decode_compact(cache::CompactEntries& e) {
    constexpr int registers = 4;
    constexpr std::size_t most = registers * in_register;
    static_assert(cache::CompactEntries::most % most == 0);
    if (e.rows <= cache::lanes) return cache::decode_entries(e);  // which is faster while half a register is empty
    // Places without a row read one of the others again, for nobody.
    for (std::size_t i = e.rows; i % most != 0; ++i) {
        e.state[i] = e.state[0];
        e.at[i] = e.at[0];
        e.end[i] = e.end[0];
        e.transitions[i] = e.transitions[0];
        e.count[i] = e.count[0];
        e.ids[i] = nullptr;
    }
    for (std::size_t first = 0; first < e.rows; first += most)
        if (const cache::Broken broken = decode_compact<registers>(e, first); broken != cache::Broken::none)
            return broken;
    return cache::Broken::none;
}

}  // namespace kdfast::cpu::KDFAST_ISA
