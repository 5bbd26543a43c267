// Rows of a fixed block, 16 ids and 64 deltas at a time; see rows_scalar.h.
#pragma once

#include "cache/rows/shared512.h"

namespace kdfast::cpu::KDFAST_ISA {

// An id lies in two of the words that follow each other.
class FromWords {
  public:
    explicit FromWords(unsigned bits) {
        const __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int>(bits)));
        word_ = _mm512_srli_epi32(at, 5);
        next_ = _mm512_add_epi32(word_, _mm512_set1_epi32(1));
        right_ = _mm512_and_si512(at, _mm512_set1_epi32(31));
        left_ = _mm512_sub_epi32(_mm512_set1_epi32(32), right_);  // by 32 leaves nothing
        mask_ = _mm512_set1_epi32(static_cast<int>((1u << bits) - 1));
    }

    KDFAST_INLINE __m512i operator()(const std::byte* ids) const {
        const __m512i words = _mm512_loadu_si512(ids);
        const __m512i low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(word_, words), right_);
        const __m512i high = _mm512_sllv_epi32(_mm512_permutexvar_epi32(next_, words), left_);
        return _mm512_ternarylogic_epi32(low, high, mask_, 0xA8);  // (low | high) & mask
    }

  private:
    __m512i word_, next_, right_, left_, mask_;
};

using Ids = IdsBy16<FromWords>;

// Whether one of the bytes is 255; borrows may say so in error only where one is.
KDFAST_INLINE bool has_long(std::uint64_t bytes) {
    constexpr std::uint64_t ones = 0x0101010101010101u;
    return ((~bytes - ones) & bytes & ones << 7) != 0;
}

inline cache::Broken decode_deltas(cache::FixedRows& f, const std::byte* deltas, std::int64_t k, float top,
                                   float* out) {
    const __m512i last = _mm512_set1_epi32(15);
    const std::byte* escapes = f.escapes;
    __m512i carry = _mm512_setzero_si512();
    for (std::int64_t begin = 0; begin < k; begin += 64) {
        // Entry 2 j has the high nibble of byte j - 1, entry 2 j + 1 the low one of byte j; entry 0 has none.
        const std::uint64_t there = deltas_there(begin, k);
        const std::byte* at = deltas + begin / 2;
        const __m512i even = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at - 1)));
        const __m512i odd = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512i nibbles = _mm512_ternarylogic_epi32(_mm512_srli_epi16(even, 4), _mm512_slli_epi16(odd, 8),
                                                          _mm512_set1_epi16(0x0F0F), 0xA8);
        __m512i d = _mm512_maskz_mov_epi8(there, nibbles);
        std::uint64_t escaped = _mm512_cmpeq_epi8_mask(d, _mm512_set1_epi8(cache::delta_escaped));

        // Sums within 16 entries fit a byte.
        d = _mm512_add_epi8(d, _mm512_bslli_epi128(d, 1));
        d = _mm512_add_epi8(d, _mm512_bslli_epi128(d, 2));
        d = _mm512_add_epi8(d, _mm512_bslli_epi128(d, 4));
        d = _mm512_add_epi8(d, _mm512_bslli_epi128(d, 8));
        __m512i s0 = _mm512_add_epi32(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(d)), carry);
        __m512i s1 = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(d, 1));
        __m512i s2 = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(d, 2));
        __m512i s3 = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(d, 3));
        s1 = _mm512_add_epi32(s1, _mm512_permutexvar_epi32(last, s0));
        s2 = _mm512_add_epi32(s2, _mm512_permutexvar_epi32(last, s1));
        s3 = _mm512_add_epi32(s3, _mm512_permutexvar_epi32(last, s2));

        // An escape adds to all entries from its own on. Few tokens have more than two.
        const auto add = [&](std::uint64_t bytes) KDFAST_INLINE_LAMBDA {
            const std::uint64_t from = -(escaped & -escaped);
            const __m512i more = _mm512_set1_epi32(static_cast<int>(bytes & 255));
            s0 = _mm512_mask_add_epi32(s0, static_cast<__mmask16>(from), s0, more);
            s1 = _mm512_mask_add_epi32(s1, static_cast<__mmask16>(from >> 16), s1, more);
            s2 = _mm512_mask_add_epi32(s2, static_cast<__mmask16>(from >> 32), s2, more);
            s3 = _mm512_mask_add_epi32(s3, static_cast<__mmask16>(from >> 48), s3, more);
            escaped &= escaped - 1;
        };
        std::int64_t n = std::popcount(escaped);
        if (n > f.escapes_end - escapes) return cache::Broken::escapes;
        do {
            const std::int64_t now = n < 8 ? n : 8;
            const auto bytes =
                get<std::uint64_t>(escapes) & (now == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << 8 * now) - 1);
            if (has_long(bytes)) return decode_deltas_one_by_one(f, deltas, k, top, out);
            add(bytes);
            add(bytes >> 8);
            for (std::int64_t i = 2; i < now; ++i) add(bytes >> 8 * i);
            escapes += now;
            n -= now;
        } while (n > 0);
        carry = _mm512_permutexvar_epi32(last, s3);
        if (begin > 0 && static_cast<std::uint32_t>(_mm512_cvtsi512_si32(carry)) >= cache::steps_limit)
            return cache::Broken::steps;

        const Put put(top, f.step, k - begin, out + begin);
        put(0, s0);
        put(16, s1);
        put(32, s2);
        put(48, s3);
    }
    f.escapes = escapes;
    return cache::Broken::none;
}

}  // namespace kdfast::cpu::KDFAST_ISA
