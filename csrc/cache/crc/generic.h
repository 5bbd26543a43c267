// CRC-32C on any machine: eight bytes at a time by eight tables.
#pragma once

#include <array>
#include <cstdint>

#include "cache/rows/scalar.h"

namespace kdfast::cpu::KDFAST_ISA {

constexpr std::uint32_t crc_polynomial = 0x82F63B78;  // reflected

// tables[j][b]: byte b with j zero bytes behind it.
constexpr std::array<std::array<std::uint32_t, 256>, 8> crc_tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        std::uint32_t c = i;
        for (int bit = 0; bit < 8; ++bit) c = c >> 1 ^ (c & 1 ? crc_polynomial : 0);
        t[0][i] = c;
    }
    for (std::size_t j = 1; j < 8; ++j)
        for (std::size_t i = 0; i < 256; ++i) t[j][i] = t[j - 1][i] >> 8 ^ t[0][t[j - 1][i] & 255];
    return t;
}();

inline std::uint32_t crc32c(const std::byte* bytes, std::size_t count, std::uint32_t state) {
    for (; count >= 8; bytes += 8, count -= 8) {
        const std::uint64_t x = get<std::uint64_t>(bytes) ^ state;
        state = 0;
        for (std::size_t j = 0; j < 8; ++j) state ^= crc_tables[7 - j][x >> 8 * j & 255];
    }
    for (; count > 0; ++bytes, --count)
        state = state >> 8 ^ crc_tables[0][(state ^ std::to_integer<std::uint32_t>(*bytes)) & 255];
    return state;
}

}  // namespace kdfast::cpu::KDFAST_ISA
