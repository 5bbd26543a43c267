// What the entries of a token may weigh together (FORMAT.md, section 6.1).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cache/kernels.h"

namespace kdfast::cache {

inline constexpr double most_mass = 1 + 1e-5;
// How much of what a mass is made of may be rounding: the largest log-probability and the lse are an f32 each. A writer
// leaves half of it to its own rounding.
inline constexpr double rounding_read = 0x1p-21, rounding_written = 0x1p-22;

// The sum of e^(x / T - lse); `inverse` is 1 / T.
inline double exact_mass(const float* logprobs, std::int64_t k, double inverse, double lse) {
    double sum = 0;
    for (std::int64_t i = 0; i < k; ++i) sum += std::exp(logprobs[i] * inverse - lse);
    return sum;
}

inline double mass_limit(double top, double inverse, double lse, double rounding) {
    return most_mass + rounding * (1 + std::abs(top) * inverse + std::abs(lse));
}

// The mass of a token's entries at temperature 1 / inverse where it is beyond that limit, else 0.
inline double mass_beyond(const Kernels& kernels, const float* logprobs, std::int64_t k, float top, double inverse,
                          float lse, double rounding) {
    constexpr double usual = 1e6;  // temperatures at which no f32 overflows
    // Of so few terms an f32 holds the sum to 3e-6 of it; most rows are below what leaves no doubt.
    constexpr std::int64_t few = 512;
    constexpr double clear = 1 + 5e-6;
    if (k == 0) return 0;
    if (inverse < usual && inverse > 1 / usual) {
        double sum = 0;
        for (std::int64_t i = 0; i < k; i += few)
            sum += kernels.mass(logprobs + i, std::min(few, k - i), static_cast<float>(inverse), lse);
        if (sum <= clear) return 0;
    }
    const double mass = exact_mass(logprobs, k, inverse, lse);
    return mass <= mass_limit(top, inverse, lse, rounding) ? 0 : mass;
}

}  // namespace kdfast::cache
