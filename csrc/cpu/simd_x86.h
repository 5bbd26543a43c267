// What the x86 units share beside their vectors. Included at the end of simd_avx512.h and simd_avx2.h.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {

KDFAST_INLINE void fence() { _mm_sfence(); }

// While this lives, numbers below the normal range are 0, as results and as operands: some processors take a hundred
// cycles over each.
struct FlushDenormals {
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
    ~FlushDenormals() { _mm_setcsr(saved); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace kdfast::cpu::KDFAST_ISA
