// What the two ways to unpack rows by 64-byte registers share; see rows_scalar.h.
#pragma once

#include <immintrin.h>

#include "cache/rows/scalar.h"

namespace kdfast::cpu::KDFAST_ISA {

KDFAST_INLINE __mmask16 lanes_below(std::int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xFFFFu : (1u << n) - 1);
}

// Which of the 64 entries from `begin` on a row of k has a delta for: its first has none.
KDFAST_INLINE std::uint64_t deltas_there(std::int64_t begin, std::int64_t k) {
    const std::int64_t left = k - begin;
    return (left >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1) & ~std::uint64_t{begin == 0};
}

// Group turns the bytes of 16 ids, which begin at a whole byte whatever their width, into lanes.
template <class Group>
class IdsBy16 {
  public:
    explicit IdsBy16(unsigned bits) : bytes_(2 * bits), group_(bits) {}

    KDFAST_INLINE void decode(const std::byte* ids, std::int64_t k, std::int32_t* out) {
        std::int64_t i = 0;
        for (; i + 16 <= k; i += 16, ids += bytes_) {
            const __m512i v = group_(ids);
            largest_ = _mm512_max_epu32(largest_, v);
            _mm512_storeu_si512(out + i, v);
        }
        if (i == k) return;
        const __mmask16 there = lanes_below(k - i);
        const __m512i v = group_(ids);
        largest_ = _mm512_mask_max_epu32(largest_, there, largest_, v);
        _mm512_mask_storeu_epi32(out + i, there, v);
    }
    std::uint32_t largest() const { return _mm512_reduce_max_epu32(largest_); }

  private:
    std::int64_t bytes_;
    Group group_;
    __m512i largest_ = _mm512_setzero_si512();
};

// Log-probabilities out of steps, of which `left` are in use; 16 at a time.
class Put {
  public:
    KDFAST_INLINE Put(float top, float step, std::int64_t left, float* out)
        : tops_(_mm512_set1_ps(top)), step_(_mm512_set1_ps(step)), left_(left), out_(out) {}

    KDFAST_INLINE void operator()(std::int64_t from, __m512i steps) const {
        const __m512 lp = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(steps), step_, tops_);  // the product is exact
        if (left_ >= from + 16)
            _mm512_storeu_ps(out_ + from, lp);
        else if (left_ > from)
            _mm512_mask_storeu_ps(out_ + from, lanes_below(left_ - from), lp);
    }

  private:
    __m512 tops_, step_;
    std::int64_t left_;
    float* out_;
};

inline std::int64_t count_escapes(const std::byte* deltas, std::int64_t count) {
    const __m512i low = _mm512_set1_epi8(0x0F), high = _mm512_set1_epi8(static_cast<char>(0xF0));
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < count; i += 64) {
        const std::uint64_t there = count - i >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << (count - i)) - 1;
        const __m512i x = _mm512_maskz_loadu_epi8(there, deltas + i);
        n += std::popcount(_mm512_cmpeq_epi8_mask(_mm512_and_si512(x, low), low));
        n += std::popcount(_mm512_cmpeq_epi8_mask(_mm512_and_si512(x, high), high));
    }
    return n;
}

}  // namespace kdfast::cpu::KDFAST_ISA
