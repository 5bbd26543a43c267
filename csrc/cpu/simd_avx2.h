// Vectors of 8 fp32: AVX2, FMA, F16C. See simd_avx512.h for what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/inline.h"

namespace kdfast::cpu::KDFAST_ISA {

constexpr int width = 8;
struct V {
    __m256 v;
};
struct M {
    __m256 m;
};
struct Pair {
    V first, second;
};

KDFAST_INLINE V set1(float x) { return {_mm256_set1_ps(x)}; }
KDFAST_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
KDFAST_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
KDFAST_INLINE void stream(float* p, V a) { _mm256_stream_ps(p, a.v); }
KDFAST_INLINE void stream_vector(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
KDFAST_INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
KDFAST_INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
KDFAST_INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
KDFAST_INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
KDFAST_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KDFAST_INLINE V affine(V x, V c, V from) { return fma(x, c, from); }
KDFAST_INLINE V fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
KDFAST_INLINE V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
KDFAST_INLINE V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
KDFAST_INLINE V abs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
KDFAST_INLINE M less(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
KDFAST_INLINE M equal(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
KDFAST_INLINE unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m.m)); }
KDFAST_INLINE V select(M m, V yes, V no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
KDFAST_INLINE V times(V a, V b) { return select(equal(a, set1(0)), a, a * b); }
KDFAST_INLINE V add_times(V c, V a, V b) { return select(equal(a, set1(0)), c, fma(a, b, c)); }
KDFAST_INLINE float hsum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
KDFAST_INLINE float hmax(V a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
constexpr bool exp2_overflows = false;
// 2^r for r in [-1/2, 1/2]
constexpr float exp2_coefficients[] = {
    1, 0.693146977599962f, 0.24022242085401063f, 0.05550733741848172f, 0.009671512640426183f, 0.0013264727642938185f};
struct Split {
    V whole, fraction;
};
// At -126.75 the polynomial is above 1, so that taking 127 from its exponent leaves a denormal and no negative number.
KDFAST_INLINE Split split(V x) {
    const V y = max(set1(-126.75f), x);
    const V whole = {_mm256_round_ps(y.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    return {whole, y - whole};
}
KDFAST_INLINE V scale2(V a, V n) {  // a NaN converts to a number without low bits, and a stays NaN
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent))};
}
// Adding 0.25 in units of the mantissa's range moves the exponent up where the mantissa is >= 1.5.
KDFAST_INLINE V exponent(V a) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x00400000));
    const __m256 e = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
    const __m256 zero = _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return {_mm256_blendv_ps(e, _mm256_set1_ps(-__builtin_inff()), zero)};
}
KDFAST_INLINE V mantissa(V a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i up = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x00400000)), 1);
    const __m256i one =
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f800000));
    const __m256 m = _mm256_castsi256_ps(_mm256_sub_epi32(one, up));
    return {_mm256_blendv_ps(m, a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}

KDFAST_INLINE V load_bf16(const std::uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
KDFAST_INLINE V load_f16(const std::uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
KDFAST_INLINE __m256i round_to_bf16(V a) {  // in the upper half of each lane
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000),
                              _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
}
KDFAST_INLINE void store_bf16(std::uint16_t* p, V a) {
    const __m256i wide = _mm256_srli_epi32(round_to_bf16(a), 16);
    const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0b11011000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(narrow));
}
// 2 * width neighbours, columns with an even number apart from the odd ones, which costs least.
KDFAST_INLINE Pair load_bf16_pair(const std::uint16_t* p) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)))}};
}
KDFAST_INLINE __m256i to_bf16_pair(Pair a) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_to_bf16(a.first), 16), round_to_bf16(a.second), 0b10101010);
}
KDFAST_INLINE void store_bf16_pair(std::uint16_t* p, Pair a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_pair(a));
}
KDFAST_INLINE void stream_bf16_pair(std::uint16_t* p, Pair a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16_pair(a));
}
KDFAST_INLINE void store_f16(std::uint16_t* p, V a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace kdfast::cpu::KDFAST_ISA

#include "cpu/simd_x86.h"
