// Rows of a fixed block, 16 ids and 64 deltas at a time, where bytes can be permuted; see rows_scalar.h.
#pragma once

#include "cache/rows/shared512.h"

namespace kdfast::cpu::KDFAST_ISA {

// An id lies in the four bytes from that of its first bit on.
class FromBytes {
  public:
    explicit FromBytes(unsigned bits) {
        alignas(64) std::uint8_t bytes[64];
        alignas(64) std::uint32_t shifts[16];
        for (unsigned i = 0; i < 16; ++i) {
            for (unsigned j = 0; j < 4; ++j) bytes[4 * i + j] = static_cast<std::uint8_t>(i * bits / 8 + j);
            shifts[i] = i * bits % 8;
        }
        bytes_ = _mm512_load_si512(bytes);
        shifts_ = _mm512_load_si512(shifts);
        mask_ = _mm512_set1_epi32(static_cast<int>((1u << bits) - 1));
    }

    KDFAST_INLINE __m512i operator()(const std::byte* ids) const {
        const __m512i fours = _mm512_permutexvar_epi8(bytes_, _mm512_loadu_si512(ids));
        return _mm512_and_si512(_mm512_srlv_epi32(fours, shifts_), mask_);
    }

  private:
    __m512i bytes_, shifts_, mask_;
};

using Ids = IdsBy16<FromBytes>;

// Where entry i of 64 is in 33 bytes: the first of eight that hold it and its neighbours, and the bit among those.
struct Nibbles {
    alignas(64) std::uint8_t bytes[64], shifts[64];
};
constexpr Nibbles nibbles = [] {
    Nibbles n{};
    for (unsigned i = 0; i < 64; ++i) {
        n.bytes[i] = static_cast<std::uint8_t>(i / 8 * 4 + i % 8);
        n.shifts[i] = static_cast<std::uint8_t>(4 + i % 8 * 4);
    }
    return n;
}();

KDFAST_INLINE cache::Broken decode_deltas(cache::FixedRows& f, const std::byte* deltas, std::int64_t k, float top,
                                          float* out) {
    const __m512i ones = _mm512_set1_epi8(1), fifteen = _mm512_set1_epi8(cache::delta_escaped);
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i up_to = _mm512_set4_epi32(0x01010101, 0x00010101, 0x00000101, 0x00000001);
    const __m512i largest_escape = _mm512_set1_epi8(static_cast<char>(255 - cache::delta_escaped));
    const std::byte* escapes = f.escapes;
    __m512i before = _mm512_setzero_si512();  // of which lane 15 is the sum of all deltas so far
    for (std::int64_t begin = 0; begin < k; begin += 64) {
        // Each eight entries have the nibbles of four bytes, from the high one of the byte before on.
        const std::uint64_t there = deltas_there(begin, k);
        const __m512i packed =
            _mm512_permutexvar_epi8(_mm512_load_si512(nibbles.bytes), _mm512_loadu_si512(deltas + begin / 2 - 1));
        __m512i d = _mm512_maskz_multishift_epi64_epi8(there, _mm512_load_si512(nibbles.shifts), packed);
        d = _mm512_and_si512(d, fifteen);
        const std::uint64_t escaped = _mm512_cmpeq_epi8_mask(d, fifteen);
        const std::int64_t n = std::popcount(escaped);
        if (n > f.escapes_end - escapes) return cache::Broken::escapes;
        const __m512i more = _mm512_maskz_expand_epi8(escaped, _mm512_loadu_si512(escapes));
        if (_mm512_cmpgt_epu8_mask(more, largest_escape) != 0)  // a long one, or their sum leaves a byte
            return decode_deltas_one_by_one(f, deltas, k, top, out);
        d = _mm512_add_epi8(d, more);
        escapes += n;

        // The sum of what comes before each four, then of the four up to each.
        const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), d, ones);
        __m512i sums = _mm512_alignr_epi32(fours, before, 15);
        const auto add = [&]<int Lanes>() KDFAST_INLINE_LAMBDA {
            sums = _mm512_add_epi32(sums, _mm512_alignr_epi32(sums, _mm512_setzero_si512(), 16 - Lanes));
        };
        add.template operator()<1>();
        add.template operator()<2>();
        add.template operator()<4>();
        add.template operator()<8>();
        before = _mm512_add_epi32(sums, fours);
        if (begin > 0) {
            const __m128i last = _mm512_extracti32x4_epi32(before, 3);
            if (static_cast<std::uint32_t>(_mm_extract_epi32(last, 3)) >= cache::steps_limit)
                return cache::Broken::steps;
        }
        const Put put(top, f.step, k - begin, out + begin);
        for (int part = 0; part < 4; ++part) {
            const __m512i four = _mm512_add_epi32(lane, _mm512_set1_epi32(4 * part));
            put(16 * part,
                _mm512_dpbusd_epi32(_mm512_permutexvar_epi32(four, sums), _mm512_permutexvar_epi32(four, d), up_to));
        }
    }
    f.escapes = escapes;
    return cache::Broken::none;
}

}  // namespace kdfast::cpu::KDFAST_ISA
