// On which side of q each p lies, for the total variation, whose gradient is a sign. Included by dense_kernel.cpp, once
// per ISA.
//
// p_i > q_i exactly where z_i - t_i > D, with
//   D = tau (logsumexp(z / tau) - logsumexp(t / tau)).
// z_i - t_i is two floats without any rounding, and D is made of sums in fp64, of relative error 2e-12, under the very
// log2(e) / tau: c in fp32 stands for another temperature, at which D is another by 1e-7 times what sets the two
// entropies apart. So a sign is right where ln p - ln q, which is (z_i - t_i - D) / tau, is further from 0 than 1e-11 +
// 5e-15 |z| / tau: the first is that of the sums, the second that of D's two floats under large logits.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

constexpr double log2e_exact = 1.4426950408889634;

// a b + c, in one rounding where that is free: sums differ between instruction sets as it is.
KDFAST_INLINE double fused(double a, double b, double c) {
#if defined(__FP_FAST_FMA)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// 2^x, relative error 2e-12; 2^-1000 below that. Adding 1.5 * 2^52 leaves the whole part in the lowest bits.
KDFAST_INLINE double exp2_exact(double x) {
    constexpr double magic = 0x1.8p52;
    const double y = x < -1000.0 ? -1000.0 : x;  // keeps NaN
    const double shifted = y + magic, r = y - (shifted - magic);
    double p = 1.325497460306718e-06;  // no loop: compilers would not make vectors of its neighbours
    p = fused(p, r, 1.531007807039615e-05);
    p = fused(p, r, 0.000154034570394104);
    p = fused(p, r, 0.0013333450573018062);
    p = fused(p, r, 0.009618129157656703);
    p = fused(p, r, 0.055504109412010456);
    p = fused(p, r, 0.24022650695821055);
    p = fused(p, r, 0.6931471805459343);
    p = fused(p, r, 0.9999999999999997);
    return p * std::bit_cast<double>((std::bit_cast<std::uint64_t>(shifted) + 1023) << 52);
}

// The sum of 2^((x - at) c) over the columns seen, c = log2(e) / tau, `at` about the largest of them.
struct ExactSum {
    double at = -std::numeric_limits<double>::infinity(), sum = 0;

    void rescale(double to, double c) {
        if (!(to > at)) return;
        if (std::isfinite(at)) sum *= std::exp2((at - to) * c);
        at = to;
    }
    double reference() const { return at == -std::numeric_limits<double>::infinity() ? 0 : at; }
    // n a multiple of width; `top` that of Sums, which no logit exceeds by much
    void add(const float* x, std::int64_t n, float top, double c) {
        rescale(static_cast<double>(top), c);
        const double from = reference();
        double lanes[width] = {};
        for (std::int64_t i = 0; i < n; i += width)
            for (int lane = 0; lane < width; ++lane)
                lanes[lane] += exp2_exact((static_cast<double>(x[i + lane]) - from) * c);
        for (const double lane : lanes) sum += lane;
    }
    void merge(ExactSum other, double c) {
        const double top = std::max(at, other.at);
        rescale(top, c);
        other.rescale(top, c);
        sum += other.sum;
    }
    double log2(double c) const { return reference() * c + std::log2(sum); }
};

struct ExactSums {
    ExactSum student, teacher;
};

// D, of logits, to subtract from z - t; NaN where a sum is no number, or infinite.
struct Offset {
    V hi, lo;
    explicit Offset(double d)
        : hi(set1(static_cast<float>(d))), lo(set1(static_cast<float>(d - static_cast<float>(d)))) {}
    // Of the sign of p - q, or not finite: z - t as difference and rounding error (Knuth), less D.
    KDFAST_INLINE V less(V z, V t) const {
        const V s = z - t, back = s - z;
        const V error = (z - (s - back)) - (t + back);
        return (s - hi) + (error - lo);
    }
};

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
