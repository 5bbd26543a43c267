// Vectors of 16 fp32: AVX-512 F, BW, DQ, VL. The three simd_*.h files offer the same names; a unit includes one of
// them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/inline.h"

namespace kdfast::cpu::KDFAST_ISA {

constexpr int width = 16;
struct V {
    __m512 v;
};
struct Pair {
    V first, second;
};
using M = __mmask16;

KDFAST_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
KDFAST_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
KDFAST_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
KDFAST_INLINE void stream(float* p, V a) { _mm512_stream_ps(p, a.v); }  // p aligned to the vector
// 64 bytes from anywhere to an aligned address, past the cache
KDFAST_INLINE void stream_vector(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
KDFAST_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
KDFAST_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
KDFAST_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
KDFAST_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
KDFAST_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
// x c + from with one rounding, on every ISA: where x c is large and the result is not, a second one would be all of
// it.
KDFAST_INLINE V affine(V x, V c, V from) { return fma(x, c, from); }
KDFAST_INLINE V fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
KDFAST_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }                // b where either is NaN
KDFAST_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }                // b where either is NaN
KDFAST_INLINE V abs(V a) { return {_mm512_abs_ps(a.v)}; }
KDFAST_INLINE M less(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
KDFAST_INLINE M equal(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
KDFAST_INLINE unsigned bits(M m) { return m; }  // a bit a lane, the first lane's lowest
KDFAST_INLINE V select(M m, V yes, V no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
// a b, and a b + c, where an a of 0 silences whatever b holds
KDFAST_INLINE V times(V a, V b) {
    return {_mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), a.v, b.v)};
}
KDFAST_INLINE V add_times(V c, V a, V b) {
    return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ))};
}
KDFAST_INLINE float hsum(V a) { return _mm512_reduce_add_ps(a.v); }
KDFAST_INLINE float hmax(V a) { return _mm512_reduce_max_ps(a.v); }
// exp2(x) = scale2(polynomial(split(x).fraction), split(x).whole) for any x. A result below 2^-126 is 0, or a denormal
// where that counts as 0 in every operation (FlushDenormals).
constexpr bool exp2_overflows = true;
// 2^r for r in [0, 1)
constexpr float exp2_coefficients[] = {0.9999999403953552f,  0.6931529641151428f,   0.24015362560749054f,
                                       0.05582643672823906f, 0.008989345282316208f, 0.0018775762291625142f};
struct Split {
    V whole, fraction;
};
// The fraction is x - floor(x), and 0 at an infinity; scale2 takes the floor of `whole` by itself.
KDFAST_INLINE Split split(V x) { return {x, {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}}; }
KDFAST_INLINE V scale2(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// x = mantissa * 2^exponent with the mantissa in [0.75, 1.5); 0 has exponent -inf
KDFAST_INLINE V exponent(V a) { return {_mm512_getexp_ps(_mm512_mul_ps(a.v, _mm512_set1_ps(4.0f / 3.0f)))}; }
KDFAST_INLINE V mantissa(V a) { return {_mm512_getmant_ps(a.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero)}; }

KDFAST_INLINE V load_bf16(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
KDFAST_INLINE V load_f16(const std::uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Rounding to bf16 is to nearest, ties to even, and a NaN stays one; in the upper half of each lane.
KDFAST_INLINE __m512i round_to_bf16(V a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i r = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    r = _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
    return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
KDFAST_INLINE void store_bf16(std::uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(a), 16)));
}
// 2 * width neighbours, columns with an even number apart from the odd ones, which costs least.
KDFAST_INLINE Pair load_bf16_pair(const std::uint16_t* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)))}};
}
KDFAST_INLINE __m512i to_bf16_pair(Pair a) {
#if defined(__AVX512BF16__)  // takes a denormal for 0, as FlushDenormals does where this is used
    const __m512i apart = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(a.second.v, a.first.v));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, apart);
#else
    const __m512i odd = _mm512_and_si512(round_to_bf16(a.second), _mm512_set1_epi32(-0x10000));
    return _mm512_or_si512(_mm512_srli_epi32(round_to_bf16(a.first), 16), odd);
#endif
}
KDFAST_INLINE void store_bf16_pair(std::uint16_t* p, Pair a) { _mm512_storeu_si512(p, to_bf16_pair(a)); }
KDFAST_INLINE void stream_bf16_pair(std::uint16_t* p, Pair a) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_bf16_pair(a));
}
KDFAST_INLINE void store_f16(std::uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace kdfast::cpu::KDFAST_ISA

#include "cpu/simd_x86.h"
