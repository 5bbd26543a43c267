// Rows of a fixed block one entry at a time: all that the generic ISA has, and what the others do with a row that holds
// a long delta. The rows_*.h files offer the same names: class Ids, decode_deltas and count_escapes.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cache/kernels.h"
#include "core/inline.h"

namespace kdfast::cpu::KDFAST_ISA {

template <class T>
KDFAST_INLINE T get(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Id i of a row.
KDFAST_INLINE std::uint32_t id_at(const std::byte* ids, std::int64_t i, unsigned bits) {
    const std::int64_t at = i * bits;
    return static_cast<std::uint32_t>(get<std::uint64_t>(ids + at / 8) >> (at & 7)) & ((1u << bits) - 1);
}

// A row's log-probabilities from its deltas.
inline cache::Broken decode_deltas_one_by_one(cache::FixedRows& f, const std::byte* deltas, std::int64_t k, float top,
                                              float* out) {
    const std::byte* escapes = f.escapes;
    std::uint64_t steps = 0;
    for (std::int64_t i = 0; i < k; ++i) {
        if (i > 0) {
            std::uint64_t delta = std::to_integer<unsigned>(deltas[(i - 1) / 2]) >> ((i - 1) % 2 * 4) & 15;
            if (delta == cache::delta_escaped) {
                if (escapes == f.escapes_end) return cache::Broken::escapes;
                const auto e = std::to_integer<unsigned>(*escapes++);
                delta += e;
                if (e == cache::escape_escaped) {
                    if (f.escapes_end - escapes < 4) return cache::Broken::escapes;
                    delta = get<std::uint32_t>(escapes);
                    escapes += 4;
                    if (delta < cache::least_long_delta) return cache::Broken::escapes;
                }
            }
            steps += delta;
        }
        if (steps >= cache::steps_limit) return cache::Broken::steps;
        out[i] = top - static_cast<float>(steps) * f.step;
    }
    f.escapes = escapes;
    return cache::Broken::none;
}

}  // namespace kdfast::cpu::KDFAST_ISA
