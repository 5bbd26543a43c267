// Random numbers that are a function of where they are used: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011), ten rounds over a counter. kdfast/selection.py has the same in
// PyTorch.
#pragma once

#include <array>
#include <cstdint>

namespace kdfast::cpu {

inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
                   static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return counter;
}

// Uniform in [0, 1), 53 bits of it.
inline double uniform(std::uint64_t seed, std::uint64_t token, std::uint32_t draw) {
    const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
    const auto r = philox({draw, low(token), low(token >> 32), 0}, {low(seed), low(seed >> 32)});
    return static_cast<double>((std::uint64_t{r[0]} << 32 | r[1]) >> 11) * 0x1p-53;
}

}  // namespace kdfast::cpu
