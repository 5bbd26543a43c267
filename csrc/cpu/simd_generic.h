// Vectors of 8 fp32 as plain arrays, for any machine: loops of fixed length that a compiler turns into what it has.
// See simd_avx512.h for what each name means.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/inline.h"

namespace kdfast::cpu::KDFAST_ISA {

constexpr int width = 8;
struct V {
    float v[width];
};
struct M {
    bool m[width];
};
struct Pair {
    V first, second;
};

#define KDFAST_LANES(expression)                         \
    V r;                                                 \
    for (int i = 0; i < width; ++i) r.v[i] = expression; \
    return r

KDFAST_INLINE V set1(float x) { KDFAST_LANES(x); }
KDFAST_INLINE V load(const float* p) { KDFAST_LANES(p[i]); }
KDFAST_INLINE void store(float* p, V a) {
    for (int i = 0; i < width; ++i) p[i] = a.v[i];
}
KDFAST_INLINE void stream(float* p, V a) { store(p, a); }
KDFAST_INLINE void stream_vector(void* to, const void* from) { std::memcpy(to, from, width * sizeof(float)); }
KDFAST_INLINE V operator+(V a, V b) { KDFAST_LANES(a.v[i] + b.v[i]); }
KDFAST_INLINE V operator-(V a, V b) { KDFAST_LANES(a.v[i] - b.v[i]); }
KDFAST_INLINE V operator*(V a, V b) { KDFAST_LANES(a.v[i] * b.v[i]); }
KDFAST_INLINE V operator/(V a, V b) { KDFAST_LANES(a.v[i] / b.v[i]); }
KDFAST_INLINE V fma(V a, V b, V c) { KDFAST_LANES(a.v[i] * b.v[i] + c.v[i]); }
KDFAST_INLINE V affine(V x, V c, V from) {
#if defined(__FP_FAST_FMAF)
    KDFAST_LANES(__builtin_fmaf(x.v[i], c.v[i], from.v[i]));
#else  // a product of two floats is exact as a double
    KDFAST_LANES(static_cast<float>(static_cast<double>(x.v[i]) * c.v[i] + from.v[i]));
#endif
}
KDFAST_INLINE V fnma(V a, V b, V c) { KDFAST_LANES(c.v[i] - a.v[i] * b.v[i]); }
KDFAST_INLINE V max(V a, V b) { KDFAST_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
KDFAST_INLINE V min(V a, V b) { KDFAST_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
KDFAST_INLINE V abs(V a) { KDFAST_LANES(std::bit_cast<float>(std::bit_cast<std::uint32_t>(a.v[i]) & 0x7fffffffu)); }
KDFAST_INLINE M less(V a, V b) {
    M r;
    for (int i = 0; i < width; ++i) r.m[i] = a.v[i] < b.v[i];
    return r;
}
KDFAST_INLINE M equal(V a, V b) {
    M r;
    for (int i = 0; i < width; ++i) r.m[i] = a.v[i] == b.v[i];
    return r;
}
KDFAST_INLINE unsigned bits(M m) {
    unsigned r = 0;
    for (int i = 0; i < width; ++i) r |= static_cast<unsigned>(m.m[i]) << i;
    return r;
}
KDFAST_INLINE V select(M m, V yes, V no) { KDFAST_LANES(m.m[i] ? yes.v[i] : no.v[i]); }
KDFAST_INLINE V times(V a, V b) { return select(equal(a, set1(0)), a, a * b); }
KDFAST_INLINE V add_times(V c, V a, V b) { return select(equal(a, set1(0)), c, fma(a, b, c)); }
KDFAST_INLINE float hsum(V a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
KDFAST_INLINE float hmax(V a) {
    float r = a.v[0];
    for (int i = 1; i < width; ++i) r = r > a.v[i] ? r : a.v[i];
    return r;
}
constexpr bool exp2_overflows = false;
// 2^r for r in [-1/2, 1/2]
constexpr float exp2_coefficients[] = {
    1, 0.693146977599962f, 0.24022242085401063f, 0.05550733741848172f, 0.009671512640426183f, 0.0013264727642938185f};
struct Split {
    V whole, fraction;
};
// Adding and taking away 1.5 * 2^23 leaves no room for a fraction; right for abs(x) < 2^22.
KDFAST_INLINE Split split(V x) {
    Split r;
    for (int i = 0; i < width; ++i) {
        const float y = x.v[i] < -127.0f ? -127.0f : x.v[i];  // keeps NaN
        r.whole.v[i] = (y + 12582912.0f) - 12582912.0f;
        r.fraction.v[i] = y - r.whole.v[i];
    }
    return r;
}
KDFAST_INLINE V scale2(V a, V n) {  // through the exponent field, where n = -127 makes 0
    V r;
    for (int i = 0; i < width; ++i) {
        const float whole = n.v[i] >= -127.0f ? n.v[i] : -127.0f;  // a NaN cannot be converted; a is NaN then
        r.v[i] =
            a.v[i] * std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) + 127) << 23);
    }
    return r;
}
KDFAST_INLINE V exponent(V a) {
    V r;
    for (int i = 0; i < width; ++i) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(a.v[i]) + 0x00400000u;
        r.v[i] = a.v[i] == 0.0f ? -INFINITY : static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 127);
    }
    return r;
}
KDFAST_INLINE V mantissa(V a) {
    V r;
    for (int i = 0; i < width; ++i) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(a.v[i]);
        const std::uint32_t one = (bits & 0x007fffffu) | 0x3f800000u;
        r.v[i] = a.v[i] != a.v[i] ? a.v[i] : std::bit_cast<float>(one - ((bits & 0x00400000u) << 1));
    }
    return r;
}

KDFAST_INLINE V load_bf16(const std::uint16_t* p) {
    KDFAST_LANES(std::bit_cast<float>(static_cast<std::uint32_t>(p[i]) << 16));
}
KDFAST_INLINE void store_bf16(std::uint16_t* p, V a) {
    for (int i = 0; i < width; ++i) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(a.v[i]);
        p[i] = static_cast<std::uint16_t>(a.v[i] != a.v[i] ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}
// 2 * width neighbours in some order, which store_bf16_pair undoes.
KDFAST_INLINE Pair load_bf16_pair(const std::uint16_t* p) { return {load_bf16(p), load_bf16(p + width)}; }
KDFAST_INLINE void store_bf16_pair(std::uint16_t* p, Pair a) {
    store_bf16(p, a.first);
    store_bf16(p + width, a.second);
}
KDFAST_INLINE void stream_bf16_pair(std::uint16_t* p, Pair a) { store_bf16_pair(p, a); }
KDFAST_INLINE V load_f16(const std::uint16_t* p) {
    V r;
    for (int i = 0; i < width; ++i) {
        const std::uint32_t h = p[i];
        const std::uint32_t magnitude = (h & 0x7fffu) << 13;
        // A half's exponent field, moved to where a float's is, is 112 too low; the product mends that and denormals
        // with it.
        float f = std::bit_cast<float>(magnitude) * 0x1p112f;
        if ((h & 0x7c00u) == 0x7c00u) f = std::bit_cast<float>(magnitude | 0x7f800000u);
        r.v[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(f) | (h & 0x8000u) << 16);
    }
    return r;
}
KDFAST_INLINE void store_f16(std::uint16_t* p, V a) {
    for (int i = 0; i < width; ++i) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(a.v[i]);
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        std::uint32_t h;
        if (magnitude > 0x7f800000u) {
            h = 0x7e00u;
        } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
            h = 0x7c00u;
        } else if (magnitude < 0x38800000u) {  // below 2^-14: the float adder rounds to a multiple of 2^-24
            h = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
        } else {
            h = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        }
        p[i] = static_cast<std::uint16_t>(h | (bits >> 16 & 0x8000u));
    }
}

KDFAST_INLINE void fence() {}
struct FlushDenormals {
    FlushDenormals() {}
};

#undef KDFAST_LANES

}  // namespace kdfast::cpu::KDFAST_ISA
