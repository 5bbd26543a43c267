// Every divergence, one vector of columns at a time. Included by dense_kernel.cpp after a simd header, once per ISA.
//
// With u = log2 p and v = log2 q of a column and d = ln q - ln p, a divergence gives
//   value       f(q, p), >= 0 and summing to D over the row,
//   student()   p df/dp, up to a multiple of p, which the gradient does not see,
//   pull()      the gradient that follows, student_i - p_i * sum student = tau dD/dz_i,
//   teacher()   q df/dq, likewise, which is needed for dD/dtau only.
// `side` has the sign of p - q: the difference itself, or what keeps its sign where that is rounded away (sides.h).
// A column of -inf has p = 0 (q = 0), and d may be infinite or NaN there, so each product with d is selected away where
// its factor is 0.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {

constexpr float ln2 = 0.693147180559945f;
constexpr float log2e = 1.44269504088896f;

// 2^-lo, ready for exp2: its coefficients, scaled.
struct Correction {
    V c[6];
    explicit Correction(float lo) {
        const float factor = std::exp2(-lo);
        for (int k = 0; k < 6; ++k) c[k] = set1(exp2_coefficients[k] * factor);
    }
};

// 2^x times a correction, relative error 2e-7; 0 below 2^-126. x is at most 128, or anything where exp2_overflows.
KDFAST_INLINE V exp2(V x, const Correction& scale) {
    const Split parts = split(x);
    V y = scale.c[5];
    for (int k = 4; k >= 0; --k) y = fma(y, parts.fraction, scale.c[k]);
    return scale2(y, parts.whole);
}

KDFAST_INLINE V exp2(V x) { return exp2(x, Correction(0)); }

// log2 x for x >= 0, absolute error 1e-7 beside the rounding; -inf at 0
KDFAST_INLINE V log2(V x) {
    const V r = mantissa(x) - set1(1.0f);
    V y = set1(-0.0915031386848903f);
    y = fma(y, r, set1(0.20166424845055014f));
    y = fma(y, r, set1(-0.25180711087740754f));
    y = fma(y, r, set1(0.2907078909846749f));
    y = fma(y, r, set1(-0.3602673223704528f));
    y = fma(y, r, set1(0.4808086083689384f));
    y = fma(y, r, set1(-0.7213520413157212f));
    y = fma(y, r, set1(1.442695780760294f));
    return fma(y, r, exponent(x));
}

// g(x) = x + expm1(-x), over x^2, for abs(x) < 1/8, relative error 8e-6. Beyond that, the plain form has enough digits.
constexpr float series_limit = 0.125f;
constexpr float kl_coefficients[] = {0.5000000847639212f, -0.16676433148902373f, 0.04167209088852112f};
KDFAST_INLINE V kl_series(V x) {
    const V y = fma(set1(kl_coefficients[2]), x, set1(kl_coefficients[1]));
    return fma(y, x, set1(kl_coefficients[0]));
}

// a g(x) = a x + b - a, where x = ln a - ln b: one summand of KL(a, b), >= 0. b where a is 0.
KDFAST_INLINE V kl_term(V a, V b, V x) {
    const V x2 = x * x;
    const V near = a * (x2 * kl_series(x));
    const V far = add_times(b - a, a, x);
    return select(less(x2, set1(series_limit * series_limit)), near, far);
}

struct Column {
    V u, v, p, q, d, side;
};

// A divergence whose pull has no shorter form.
template <class D>
struct General {
    V pull(const Column& c, V sum_student) const {
        return fnma(c.p, sum_student, static_cast<const D*>(this)->student(c));
    }
};

struct ForwardKl {
    static constexpr bool sum_student_known = true;  // sum student is -1
    explicit ForwardKl(float) {}
    V pull(const Column& c, V) const { return c.p - c.q; }
    V value(const Column& c) const { return kl_term(c.q, c.p, c.d); }
    V student(const Column& c) const { return set1(0) - c.q; }
    V teacher(const Column& c) const { return times(c.q, c.d); }
};

struct ReverseKl {
    static constexpr bool sum_student_known = true;  // sum student is D, which the first pass has
    explicit ReverseKl(float) {}
    V value(const Column& c) const { return kl_term(c.p, c.q, set1(0) - c.d); }
    V pull(const Column& c, V sum_student) const { return times(c.p, (set1(0) - c.d) - sum_student); }
    V student(const Column& c) const { return set1(0) - times(c.p, c.d); }
    V teacher(const Column& c) const { return set1(0) - c.p; }
};

// a p + b q where both are mixed. Where it underflows neither has a say, and its logarithm must stay finite.
KDFAST_INLINE V mix(V a, V p, V b, V q) { return max(set1(0x1p-126f), fma(a, p, b * q)); }

struct Jsd : General<Jsd> {
    static constexpr bool sum_student_known = false;
    V beta, rest;
    explicit Jsd(float b) : beta(set1(b)), rest(set1(1 - b)) {}
    V log2_mixture(const Column& c) const { return log2(mix(beta, c.q, rest, c.p)); }
    V value(const Column& c) const {
        const V m = mix(beta, c.q, rest, c.p);
        const V lm = log2(m);
        const V dq = (c.v - lm) * set1(ln2), dp = (c.u - lm) * set1(ln2);
        return fma(beta, kl_term(c.q, m, dq), rest * kl_term(c.p, m, dp));
    }
    V student(const Column& c) const { return rest * times(c.p, (c.u - log2_mixture(c)) * set1(ln2)); }
    V teacher(const Column& c) const { return beta * times(c.q, (c.v - log2_mixture(c)) * set1(ln2)); }
};

struct SkewForwardKl : General<SkewForwardKl> {  // KL(q, m), m = lam q + (1 - lam) p
    static constexpr bool sum_student_known = false;
    V lam, rest;
    explicit SkewForwardKl(float l) : lam(set1(l)), rest(set1(1 - l)) {}
    V mixture(const Column& c) const { return mix(lam, c.q, rest, c.p); }
    V value(const Column& c) const {
        const V m = mixture(c);
        return kl_term(c.q, m, (c.v - log2(m)) * set1(ln2));
    }
    V student(const Column& c) const { return set1(0) - times(c.q, rest * c.p / mixture(c)); }
    V teacher(const Column& c) const {
        const V m = mixture(c);
        return times(c.q, (c.v - log2(m)) * set1(ln2) - lam * c.q / m);
    }
};

struct SkewReverseKl : General<SkewReverseKl> {  // KL(p, m), m = (1 - lam) q + lam p
    static constexpr bool sum_student_known = false;
    V lam, rest;
    explicit SkewReverseKl(float l) : lam(set1(l)), rest(set1(1 - l)) {}
    V mixture(const Column& c) const { return mix(rest, c.q, lam, c.p); }
    V value(const Column& c) const {
        const V m = mixture(c);
        return kl_term(c.p, m, (c.u - log2(m)) * set1(ln2));
    }
    V student(const Column& c) const {
        const V m = mixture(c);
        return times(c.p, (c.u - log2(m)) * set1(ln2) - lam * c.p / m);
    }
    V teacher(const Column& c) const { return set1(0) - times(c.p, rest * c.q / mixture(c)); }
};

struct Tvd : General<Tvd> {
    static constexpr bool sum_student_known = false;
    explicit Tvd(float) {}
    V value(const Column& c) const { return set1(0.5f) * abs(c.p - c.q); }
    static V half_sign(V x) {  // sign(0) = 0; x - x is 0 or NaN
        return select(less(set1(0), x), set1(0.5f), select(less(x, set1(0)), set1(-0.5f), x - x));
    }
    V student(const Column& c) const { return c.p * half_sign(c.side); }
    V teacher(const Column& c) const { return c.q * (set1(0) - half_sign(c.side)); }
};

struct AlphaDiv : General<AlphaDiv> {
    static constexpr bool sum_student_known = false;
    V a, rest, scale;
    explicit AlphaDiv(float x) : a(set1(x)), rest(set1(1 - x)), scale(set1(1 / (x * (1 - x)))) {}
    V geometric(const Column& c) const { return exp2(fma(a, c.v, rest * c.u)); }  // q^a p^(1-a)
    // [a q + (1 - a) p - q^a p^(1-a)] / (a (1 - a)), which with g(x) = x + expm1(-x) is
    // q [(1 - a) g(d) - g((1 - a) d)] / (a (1 - a)); of g's series, term by term, nothing is left to cancel.
    V value(const Column& c) const {
        const V r = rest, r2 = r * r;
        const V linear = set1(kl_coefficients[1]) * (set1(1) + r);
        const V square = set1(kl_coefficients[2]) * (set1(1) + r + r2);
        const V near = c.q * (c.d * c.d) * fma(fma(square, c.d, linear), c.d, set1(kl_coefficients[0]));
        const V far = max(set1(0), scale * (fma(a, c.q, rest * c.p) - geometric(c)));
        return select(less(abs(c.d), set1(series_limit)), near, far);
    }
    V student(const Column& c) const { return set1(0) - scale * rest * geometric(c); }
    V teacher(const Column& c) const { return set1(0) - scale * a * geometric(c); }
};

struct Hellinger : General<Hellinger> {
    static constexpr bool sum_student_known = false;
    explicit Hellinger(float) {}
    V geometric(const Column& c) const { return exp2(set1(0.5f) * (c.u + c.v)); }  // sqrt(p q)
    // (sqrt p - sqrt q)^2 / 2 = sqrt(p q) (cosh(d / 2) - 1)
    V value(const Column& c) const {
        const V r = geometric(c);
        const V y2 = set1(0.25f) * (c.d * c.d);
        const V series = fma(y2, fma(y2, set1(1.0f / 720), set1(1.0f / 24)), set1(0.5f));
        const V near = r * y2 * series;
        const V far = set1(0.5f) * (c.p + c.q) - r;
        return select(less(abs(c.d), set1(2 * series_limit)), near, far);
    }
    V student(const Column& c) const { return set1(-0.5f) * geometric(c); }
    V teacher(const Column& c) const { return student(c); }
};

// Any weighted sum: each term is asked in turn, at the price of a predictable branch a vector.
struct Mixture : General<Mixture> {
    static constexpr bool sum_student_known = false;
    const std::vector<Term>* terms;
    explicit Mixture(const std::vector<Term>& t) : terms(&t) {}

    template <class Get>
    V sum(Get get) const {
        V total = set1(0);
        for (const Term& t : *terms) total = fma(set1(t.weight), with(t, get), total);
        return total;
    }
    template <class Get>
    static V with(const Term& t, Get get) {
        switch (t.kind) {
            case Divergence::forward_kl:
                return get(ForwardKl(t.parameter));
            case Divergence::reverse_kl:
                return get(ReverseKl(t.parameter));
            case Divergence::jsd:
                return get(Jsd(t.parameter));
            case Divergence::skew_forward_kl:
                return get(SkewForwardKl(t.parameter));
            case Divergence::skew_reverse_kl:
                return get(SkewReverseKl(t.parameter));
            case Divergence::tvd:
                return get(Tvd(t.parameter));
            case Divergence::alpha_div:
                return get(AlphaDiv(t.parameter));
            case Divergence::hellinger:
                return get(Hellinger(t.parameter));
        }
        __builtin_unreachable();
    }
    V value(const Column& c) const {
        return sum([&](const auto& d) { return d.value(c); });
    }
    V student(const Column& c) const {
        return sum([&](const auto& d) { return d.student(c); });
    }
    V teacher(const Column& c) const {
        return sum([&](const auto& d) { return d.teacher(c); });
    }
};

}  // namespace kdfast::cpu::KDFAST_ISA
