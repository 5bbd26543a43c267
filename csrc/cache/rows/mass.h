// What the entries of a token may weigh together (FORMAT.md, section 6.1).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cache/codec.h"
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

// Calls report(temperature, mass) where a token's k entries weigh more than they may at one of the captured
// temperatures. `top` is the largest log-probability.
template <class Report>
void check_masses(const Kernels& kernels, const Layout& layout, const Source& rows, std::int64_t token, std::int64_t k,
                  float top, double rounding, Report report) {
    constexpr double usual = 1e6;  // temperatures at which no f32 overflows
    // Of so few terms an f32 holds the sum to 3e-6 of it; most rows are below what leaves no doubt.
    constexpr std::int64_t few = 512;
    constexpr double clear = 1 + 5e-6;
    if (k == 0) return;
    const float* const logprobs = rows.logprobs + token * layout.kept;
    const auto in_parts = [&](auto part) {
        for (std::int64_t i = 0; i < k; i += few) part(logprobs + i, std::min(few, k - i));
    };
    const auto exactly = [&](double temperature, float lse) {
        const double mass = exact_mass(logprobs, k, 1 / temperature, lse);
        if (!(mass <= mass_limit(top, 1 / temperature, lse, rounding))) report(temperature, mass);
    };
    double at_two = 0, at_one = 0;  // of one exponential for both
    in_parts([&](const float* x, std::int64_t count) {
        float sums[2];
        kernels.masses(x, count, sums);
        at_two += sums[0];
        at_one += sums[1];
    });
    if (!(at_one <= clear)) exactly(1, 0);
    for (std::size_t t = 0; t < layout.temperatures.size(); ++t) {
        const double temperature = layout.temperatures[t];
        const float lse = rows.lse[static_cast<std::int64_t>(t) * rows.lse_stride + token];
        double about = temperature == 2 ? at_two * std::exp(-double{lse}) : 2;
        if (temperature != 2 && temperature < usual && temperature > 1 / usual) {
            about = 0;
            in_parts([&](const float* x, std::int64_t count) {
                about += kernels.mass(x, count, static_cast<float>(1 / temperature), lse);
            });
        }
        if (!(about <= clear)) exactly(temperature, lse);
    }
}

}  // namespace kdfast::cache
