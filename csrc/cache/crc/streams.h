// CRC-32C by the processor's own instruction: three streams at a time, as each takes three cycles to give way to its
// next, put together by carry-less products.
#pragma once

#include <immintrin.h>

#include "cache/rows/scalar.h"

namespace kdfast::cpu::KDFAST_ISA {

constexpr std::uint32_t crc_polynomial = 0x82F63B78;  // reflected: bit 31 is x^0

// x^n modulo the polynomial, reflected.
constexpr std::uint32_t crc_power(std::size_t n) {
    std::uint32_t power = 1u << 31;
    for (; n > 0; --n) power = power >> 1 ^ (power & 1 ? crc_polynomial : 0);
    return power;
}

// What `bytes` zero bytes turn a state into, when multiplied and reduced: the reduction is by x^32, and one more of x
// is in a product of reflected factors.
template <std::size_t Bytes>
KDFAST_INLINE std::uint64_t crc_shift(std::uint64_t state) {
    static constexpr std::uint32_t factor = crc_power(8 * Bytes - 33);
    const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128(static_cast<long long>(state)),
                                                 _mm_cvtsi32_si128(static_cast<int>(factor)), 0);
    return _mm_crc32_u64(0, static_cast<std::uint64_t>(_mm_cvtsi128_si64(product)));
}

template <std::size_t Stream>
KDFAST_INLINE void crc_three_streams(const std::byte*& bytes, std::size_t& count, std::uint64_t& state) {
    for (; count >= 3 * Stream; bytes += 3 * Stream, count -= 3 * Stream) {
        std::uint64_t second = 0, third = 0;
        for (std::size_t i = 0; i < Stream; i += 8) {
            state = _mm_crc32_u64(state, get<std::uint64_t>(bytes + i));
            second = _mm_crc32_u64(second, get<std::uint64_t>(bytes + Stream + i));
            third = _mm_crc32_u64(third, get<std::uint64_t>(bytes + 2 * Stream + i));
        }
        state = crc_shift<2 * Stream>(state) ^ crc_shift<Stream>(second) ^ third;
    }
}

inline std::uint32_t crc_by_streams(const std::byte* bytes, std::size_t count, std::uint32_t before) {
    std::uint64_t state = before;
    crc_three_streams<1024>(bytes, count, state);
    crc_three_streams<128>(bytes, count, state);
    for (; count >= 8; bytes += 8, count -= 8) state = _mm_crc32_u64(state, get<std::uint64_t>(bytes));
    auto narrow = static_cast<std::uint32_t>(state);
    for (; count > 0; ++bytes, --count) narrow = _mm_crc32_u8(narrow, std::to_integer<unsigned char>(*bytes));
    return narrow;
}

}  // namespace kdfast::cpu::KDFAST_ISA
