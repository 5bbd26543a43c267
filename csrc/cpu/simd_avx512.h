// Vectors of 16 fp32: AVX-512 F, BW, DQ, VL. The three simd_*.h files offer the same names; a unit includes one of
// them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kdfast::cpu::KDFAST_ISA {

constexpr int width = 16;
struct V {
    __m512 v;
};
struct Pair {
    V first, second;
};
using M = __mmask16;

#define KDFAST_INLINE [[gnu::always_inline]] inline
#define KDFAST_INLINE_LAMBDA __attribute__((always_inline))

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
// x rounded to the nearest integer
KDFAST_INLINE V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// exp2 is scale2(polynomial(x - n), n) with x = exp2_argument(x), n = round(x), for any x that exp2_overflows allows:
// up to 128, or any. A result below 2^-126 is 0, or a denormal where that counts as 0 in every operation
// (FlushDenormals).
constexpr bool exp2_overflows = true;
KDFAST_INLINE V exp2_argument(V x) { return max(set1(-256), x); }  // -inf - round(-inf) is NaN
KDFAST_INLINE V scale2(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// x - floor(x), and 0 at an infinity; scale2 takes the floor of n by itself.
#define KDFAST_FRACTION
KDFAST_INLINE V fraction(V a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
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
// Rounding to bf16 is to nearest, ties to even, and a NaN stays one.
KDFAST_INLINE __m256i to_bf16(V a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i r = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    r = _mm512_srli_epi32(_mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1)), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
}
KDFAST_INLINE void store_bf16(std::uint16_t* p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
// Neighbours, 2 * width in all, where FlushDenormals lives: the instruction takes a denormal for 0.
KDFAST_INLINE __m512i to_bf16_pair(Pair a) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(a.second.v, a.first.v));
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(a.first)), to_bf16(a.second), 1);
#endif
}
KDFAST_INLINE Pair load_bf16_pair(const std::uint16_t* p) { return {load_bf16(p), load_bf16(p + width)}; }
// The same columns in whatever order costs least.
KDFAST_INLINE Pair load_bf16_pair_unordered(const std::uint16_t* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)))}};
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
