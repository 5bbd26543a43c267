// Rows of a fixed block, 8 ids and 32 deltas at a time; see rows_scalar.h.
#pragma once

#include <immintrin.h>

#include "cache/rows/scalar.h"

namespace kdfast::cpu::KDFAST_ISA {

// All ones in the lanes below n.
KDFAST_INLINE __m256i lanes_below(std::int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// 8 ids begin at a whole byte, whatever their width; each lies in the four bytes from that of its first bit on.
class Ids {
  public:
    explicit Ids(unsigned bits) : group_(bits), half_(bits / 2) {
        alignas(32) std::int8_t bytes[32];
        alignas(32) std::int32_t shifts[8];
        for (unsigned i = 0; i < 8; ++i) {
            const unsigned at = i * bits - (i < 4 ? 0 : bits / 2 * 8);
            for (unsigned j = 0; j < 4; ++j) bytes[4 * i + j] = static_cast<std::int8_t>(at / 8 + j);
            shifts[i] = static_cast<std::int32_t>(at % 8);
        }
        bytes_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
        shifts_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
        mask_ = _mm256_set1_epi32(static_cast<int>((1u << bits) - 1));
    }

    KDFAST_INLINE void decode(const std::byte* ids, std::int64_t k, std::int32_t* out) {
        std::int64_t i = 0;
        for (; i + 8 <= k; i += 8, ids += group_) {
            const __m256i v = group(ids);
            largest_ = _mm256_max_epu32(largest_, v);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), v);
        }
        if (i == k) return;
        const __m256i there = lanes_below(k - i), v = _mm256_and_si256(group(ids), there);
        largest_ = _mm256_max_epu32(largest_, v);
        _mm256_maskstore_epi32(out + i, there, v);
    }
    std::uint32_t largest() const {
        alignas(32) std::uint32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest_);
        std::uint32_t most = 0;
        for (const std::uint32_t lane : lanes) most = lane > most ? lane : most;
        return most;
    }

  private:
    KDFAST_INLINE __m256i group(const std::byte* ids) const {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids + half_));
        const __m256i words =
            _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), bytes_);
        return _mm256_and_si256(_mm256_srlv_epi32(words, shifts_), mask_);
    }

    std::int64_t group_, half_;
    __m256i bytes_, shifts_, mask_, largest_ = _mm256_setzero_si256();
};

inline cache::Broken decode_deltas(cache::FixedRows& f, const std::byte* deltas, std::int64_t k, float top,
                                   float* out) {
    const __m256 tops = _mm256_set1_ps(top), step = _mm256_set1_ps(f.step);
    const __m256i last = _mm256_set1_epi32(7), lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i lane_byte = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                               21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    const std::byte* escapes = f.escapes;
    __m256i carry = _mm256_setzero_si256();
    for (std::int64_t begin = 0; begin < k; begin += 32) {
        // Entry 2 j has the high nibble of byte j - 1, entry 2 j + 1 the low one of byte j; entry 0 has none.
        const std::int64_t left = k - begin;
        __m256i there = _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(left < 32 ? left : 32)), lane_byte);
        if (begin == 0) there = _mm256_and_si256(there, _mm256_cmpgt_epi8(lane_byte, _mm256_setzero_si256()));
        const std::byte* at = deltas + begin / 2;
        const __m256i even = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at - 1)));
        const __m256i odd = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        const __m256i nibbles = _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(even, 4), _mm256_slli_epi16(odd, 8)),
                                                 _mm256_set1_epi8(0x0F));
        __m256i d = _mm256_and_si256(nibbles, there);
        auto escaped = static_cast<std::uint32_t>(
            _mm256_movemask_epi8(_mm256_cmpeq_epi8(d, _mm256_set1_epi8(cache::delta_escaped))));

        // Sums within 16 entries fit a byte.
        d = _mm256_add_epi8(d, _mm256_slli_si256(d, 1));
        d = _mm256_add_epi8(d, _mm256_slli_si256(d, 2));
        d = _mm256_add_epi8(d, _mm256_slli_si256(d, 4));
        d = _mm256_add_epi8(d, _mm256_slli_si256(d, 8));
        const __m128i first = _mm256_castsi256_si128(d), second = _mm256_extracti128_si256(d, 1);
        __m256i s0 = _mm256_add_epi32(_mm256_cvtepu8_epi32(first), carry);
        __m256i s1 = _mm256_add_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(first, 8)), carry);
        const __m256i half = _mm256_permutevar8x32_epi32(s1, last);
        __m256i s2 = _mm256_add_epi32(_mm256_cvtepu8_epi32(second), half);
        __m256i s3 = _mm256_add_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(second, 8)), half);

        // An escape adds to all entries from its own on.
        while (escaped != 0) {
            if (escapes == f.escapes_end) return cache::Broken::escapes;
            const auto e = std::to_integer<unsigned>(*escapes++);
            if (e == cache::escape_escaped) return decode_deltas_one_by_one(f, deltas, k, top, out);
            const __m256i more = _mm256_set1_epi32(static_cast<int>(e));
            const __m256i before = _mm256_set1_epi32(std::countr_zero(escaped) - 1);
            const auto add = [&](__m256i& s, int from) KDFAST_INLINE_LAMBDA {
                const __m256i entry = _mm256_add_epi32(lane, _mm256_set1_epi32(from));
                s = _mm256_add_epi32(s, _mm256_and_si256(_mm256_cmpgt_epi32(entry, before), more));
            };
            add(s0, 0);
            add(s1, 8);
            add(s2, 16);
            add(s3, 24);
            escaped &= escaped - 1;
        }
        carry = _mm256_permutevar8x32_epi32(s3, last);
        if (begin > 0 && static_cast<std::uint32_t>(_mm256_cvtsi256_si32(carry)) >= cache::steps_limit)
            return cache::Broken::steps;

        const auto put = [&](std::int64_t from, __m256i steps) KDFAST_INLINE_LAMBDA {
            const __m256 lp = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(steps), step, tops);  // the product is exact
            if (left >= from + 8)
                _mm256_storeu_ps(out + begin + from, lp);
            else if (left > from)
                _mm256_maskstore_ps(out + begin + from, lanes_below(left - from), lp);
        };
        put(0, s0);
        put(8, s1);
        put(16, s2);
        put(24, s3);
    }
    f.escapes = escapes;
    return cache::Broken::none;
}

inline std::int64_t count_escapes(const std::byte* deltas, std::int64_t count) {
    const __m256i low = _mm256_set1_epi8(0x0F), high = _mm256_set1_epi8(static_cast<char>(0xF0));
    std::int64_t n = 0, i = 0;
    const auto count_in = [](__m256i x, __m256i mask) KDFAST_INLINE_LAMBDA {
        return std::popcount(
            static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(x, mask), mask))));
    };
    for (; i + 32 <= count; i += 32) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(deltas + i));
        n += count_in(x, low) + count_in(x, high);
    }
    for (; i < count; ++i) {
        const auto byte = std::to_integer<unsigned>(deltas[i]);
        n += (byte & 15) == cache::delta_escaped;
        n += byte >> 4 == cache::delta_escaped;
    }
    return n;
}

}  // namespace kdfast::cpu::KDFAST_ISA
