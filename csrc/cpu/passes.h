// What a pass does to one tile. Included by dense_kernel.cpp, once per ISA.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

// --- Pass 1: maxima and sums of exponentials

// How softmax(z) follows from softmax(z / tau): equal, by squaring, or by an exponential of its own.
enum class Tau : std::uint8_t { one, two, other };

// A maximum and sums of exp(x - maximum), brought up to a new maximum whenever a tile has one.
struct Sums {
    float max = -infinity;
    double at_tau = 0, at_one = 0, cross = 0;

    void rescale(float to, double inv_tau) {
        if (!(to > max)) return;
        if (max != -infinity) {  // before, the sums are 0, or NaN and to stay so
            const double shift = static_cast<double>(max) - to;
            const double f = std::exp(shift * inv_tau);
            at_tau *= f;
            cross *= f;
            at_one *= std::exp(shift);
        }
        max = to;
    }
    void merge(Sums other, double inv_tau) {
        const float top = std::max(max, other.max);
        rescale(top, inv_tau);
        other.rescale(top, inv_tau);
        at_tau += other.at_tau;
        at_one += other.at_one;
        cross += other.cross;
    }
    // A row of -inf alone has no maximum to subtract; 0 keeps -inf - max from being NaN, and a NaN a NaN.
    float reference() const { return max == -infinity ? 0.0f : max; }
};

struct Smoothing {
    double sum = 0, present = 0;
};

struct SegmentSums {
    Sums student;  // columns under the distillation term
    Sums rest;     // columns beyond them
    Smoothing smoothing;
};

// Cross = sum exp((z - max) / tau) (z - t): the reverse KL's normaliser before normalisation.
template <Tau T, bool Cross>
void add_tile(const float* z, const float* t, std::int64_t n, float inv_tau, Sums& sums) {
    sums.rescale(max_of(z, n), inv_tau);
    const V m = set1(sums.reference()), c = set1(inv_tau * log2e), one = set1(log2e);
    V s0 = set1(0), s1 = set1(0), o0 = set1(0), o1 = set1(0), x0 = set1(0);
    const auto step = [&](std::int64_t i, V& s, V& o) {
        const V raw = load(z + i);
        const V x = raw - m;
        const V e = exp2(x * c);
        s = s + e;
        if constexpr (T == Tau::two) o = fma(e, e, o);
        if constexpr (T == Tau::other) o = o + exp2(x * one);
        if constexpr (Cross) x0 = x0 + times(e, raw - load(t + i));
    };
    std::int64_t i = 0;
    for (; i + 2 * width <= n; i += 2 * width) {
        step(i, s0, o0);
        step(i + width, s1, o1);
    }
    if (i < n) step(i, s0, o0);
    const double at_tau = hsum(s0 + s1);
    sums.at_tau += at_tau;
    sums.at_one += T == Tau::one ? at_tau : hsum(o0 + o1);
    if constexpr (Cross) sums.cross += hsum(x0);
}

void add_smoothing(const float* z, std::int64_t n, Smoothing& s) {
    V sum = set1(0), present = set1(0);
    for (std::int64_t i = 0; i < n; i += width) {
        const V x = load(z + i);
        const M there = less(set1(-infinity), x);
        sum = sum + select(there, x, set1(0));
        present = present + select(there, set1(1), set1(0));
    }
    s.sum += hsum(sum);
    s.present += hsum(present);
}

// --- Passes 2 and 3: the value and the gradient

// What is known of a row once pass 1 is over, rounded to fp32 as it is saved for a later backward call.
struct RowState {
    float max, log2_sum;          // of z / tau over the distilled columns: log2 p = (z - max) c - log2_sum
    float max_one, log2_sum_one;  // of z over all columns
    float normaliser;             // sum of student(column) over the row
    float present;                // columns whose logit is not -inf; counted for label smoothing only
};
struct TeacherState {
    float max, log2_sum;
};

struct RowConstants {
    float inv_tau;
    RowState state;
    TeacherState teacher = {0, 0};  // as here where the tile holds log2 q already
    float teacher_factor = 1;
    float c_soft = 0;      // c_soft * weight / tau
    float c_one = 0;       // factor of softmax(z): c_hard + 2 c_z logsumexp(z)
    float one_from_p = 0;  // Tau::one: softmax(z) = p * this; Tau::two: p^2 * this
};

struct Value {
    double value = 0, normaliser = 0;
    double student_u = 0, p_u = 0, teacher_v = 0, q_v = 0, teacher = 0;  // for dD/dtau

    void operator+=(const Value& o) {
        value += o.value;
        normaliser += o.normaliser;
        student_u += o.student_u;
        p_u += o.p_u;
        teacher_v += o.teacher_v;
        q_v += o.q_v;
        teacher += o.teacher;
    }
};

enum class Want : std::uint8_t { value, value_and_dtau, gradient, value_and_gradient };

template <class D, Tau T, Want W>
void visit(const D& divergence, const float* z, const float* t, std::int64_t n, const RowConstants& row, float* g, Value& sums) {
    constexpr bool wants_gradient = W == Want::gradient || W == Want::value_and_gradient;
    const V max = set1(row.state.max), c = set1(row.inv_tau * log2e), log2_sum = set1(-row.state.log2_sum);
    const V tmax = set1(row.teacher.max), tc = set1(row.teacher_factor), tlog2_sum = set1(-row.teacher.log2_sum);
    const V max_one = set1(row.state.max_one), log2_sum_one = set1(-row.state.log2_sum_one);
    const V c_soft = set1(row.c_soft), c_one = set1(row.c_one), one_from_p = set1(row.one_from_p * row.c_one);
    const V normaliser = set1(row.state.normaliser);
    V value = set1(0), total = value, student_u = value, p_u = value, teacher_v = value, q_v = value, teacher = value;
    for (std::int64_t i = 0; i < n; i += width) {
        const V raw = load(z + i);
        Column col;
        col.u = fma(raw - max, c, log2_sum);
        col.v = fma(load(t + i) - tmax, tc, tlog2_sum);
        col.p = exp2(col.u);
        col.q = exp2(col.v);
        col.d = (col.v - col.u) * set1(ln2);
        if constexpr (W != Want::gradient) value = value + divergence.value(col);
        if constexpr (W == Want::value || W == Want::value_and_dtau) {
            const V student = divergence.student(col);
            total = total + student;
            if constexpr (W == Want::value_and_dtau) student_u = student_u + times(student, col.u);
        }
        if constexpr (W == Want::value_and_dtau) {
            p_u = p_u + times(col.p, col.u);
            const V other = divergence.teacher(col);
            teacher = teacher + other;
            teacher_v = teacher_v + times(other, col.v);
            q_v = q_v + times(col.q, col.v);
        }
        if constexpr (wants_gradient) {
            V one;
            if constexpr (T == Tau::one) one = col.p * one_from_p;
            if constexpr (T == Tau::two) one = col.p * col.p * one_from_p;
            if constexpr (T == Tau::other) one = exp2(fma(raw - max_one, set1(log2e), log2_sum_one)) * c_one;
            store(g + i, fma(c_soft, fnma(col.p, normaliser, divergence.student(col)), one));
        }
    }
    if constexpr (W != Want::gradient) sums.value += hsum(value);
    sums.normaliser += hsum(total);
    if constexpr (W == Want::value_and_dtau) {
        sums.student_u += hsum(student_u);
        sums.p_u += hsum(p_u);
        sums.teacher_v += hsum(teacher_v);
        sums.q_v += hsum(q_v);
        sums.teacher += hsum(teacher);
    }
}

// Adds `amount` in every column whose logit is not -inf.
void add_where_present(const float* z, std::int64_t n, float amount, float* g) {
    for (std::int64_t i = 0; i < n; i += width) {
        const M there = less(set1(-infinity), load(z + i));
        store(g + i, load(g + i) + select(there, set1(amount), set1(0)));
    }
}

// The gradient where only cross-entropy and z-loss have one.
void visit_hard(const float* z, std::int64_t n, const RowConstants& row, float* g) {
    const V max = set1(row.state.max_one), log2_sum = set1(-row.state.log2_sum_one), c = set1(row.c_one);
    for (std::int64_t i = 0; i < n; i += width)
        store(g + i, exp2(fma(load(z + i) - max, set1(log2e), log2_sum)) * c);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
