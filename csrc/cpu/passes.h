// What a pass does to one tile. Included by dense_kernel.cpp, once per ISA.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

// --- Pass 1: maxima and sums of exponentials

// How softmax(z) follows from softmax(z / tau): equal, by squaring, or by an exponential of its own.
enum class Tau : std::uint8_t { one, two, other };

// log2 of a normaliser, in two floats: log2 p = x c - hi - lo. The part that hi rounds away would be a relative error
// of 1e-6 in every p; lo goes into the coefficients of exp2 and costs nothing.
struct Normaliser {
    float hi, lo;
    static Normaliser of(double log2_sum) {
        const float rounded = static_cast<float>(log2_sum);
        return {rounded, static_cast<float>(log2_sum - rounded)};
    }
};

// Sums of 2^(x c - reference), c = log2e / tau or log2e, reference = max c rounded to fp32, where max is a logit that
// none of those seen exceeds by much. Sums are brought up to a new maximum when they must be.
struct Sums {
    float max = -infinity;
    double at_tau = 0, at_one = 0;
    double cross = 0;   // of the same exponentials times the distance to the other distribution's logits, times c
    double spread = 0;  // of the same times their own exponents, where a call observes: see Observe
    float largest = -infinity;     // the largest logit, then, which `max` need not be
    std::int64_t largest_at = -1;  // the first column of the first tile that holds it
    bool absent = false;           // whether a tile had a logit of -inf

    // A row of -inf alone has no maximum; a reference of 0 keeps -inf - reference from being NaN, and a NaN a NaN.
    static float reference(float max, float c) { return max == -infinity ? 0.0f : max * c; }
    float reference(float c) const { return reference(max, c); }

    void rescale(float to, float c) {
        if (!(to > max)) return;
        if (max != -infinity) {  // before, the sums are 0, or NaN and to stay so
            const double shift = static_cast<double>(reference(c)) - reference(to, c), f = std::exp2(shift);
            spread = (spread + shift * at_tau) * f;
            at_tau *= f;
            cross *= f;
            at_one *= c == log2e ? f : std::exp2(static_cast<double>(reference(log2e)) - reference(to, log2e));
        }
        max = to;
    }
    void merge(Sums other, float c) {
        const float top = std::max(max, other.max);
        rescale(top, c);
        other.rescale(top, c);
        at_tau += other.at_tau;
        at_one += other.at_one;
        cross += other.cross;
        spread += other.spread;
        see(other.largest, other.largest_at);
    }
    // Of columns to the right of all seen before.
    void see(float logit, std::int64_t at) {
        if (!(logit > largest)) return;
        largest = logit;
        largest_at = at;
    }
    double log2_at_tau(float c) const { return reference(c) + std::log2(at_tau); }
    double log2_at_one() const { return reference(log2e) + std::log2(at_one); }
    // Of the distribution at tau, nats, from log2_at_tau; rounding may have left it below 0.
    double entropy(double log2_sum, float c) const {
        const double bits = log2_sum - reference(c) - spread / at_tau;
        return bits < 0 ? 0 : bits * static_cast<double>(ln2);
    }
    // logsumexp, nats, with the rounding of log2e and of the reference taken out where the logits are large
    double logsumexp() const {
        const double top = max == -infinity ? 0 : max;
        return top + (log2_at_one() - top * static_cast<double>(log2e)) * static_cast<double>(ln2);
    }
};

struct Smoothing {
    double sum = 0, present = 0;
};

struct SegmentSums {
    Sums student;  // columns under the distillation term
    Sums rest;     // columns beyond them
    Smoothing smoothing;
};

// Whether pass 1 finds the largest logit and the entropy, too; where no logit is -inf, a step less of them.
enum class Observe : std::uint8_t { no, present, any };

// The same for a vector that absent columns fill up.
template <Observe O>
constexpr Observe with_absent = O == Observe::no ? Observe::no : Observe::any;

struct TileSums {
    float at_tau = 0, at_one = 0, cross = 0, spread = 0, top = -infinity;
    // Above what a tile can sum to under a reference that is its maximum: a larger logit came late. An exponent that is
    // large loses the digits that its size takes, so that much more than this must not go unnoticed.
    bool overflowed() const { return !(at_tau < 16 * tile && at_one < 16 * tile); }
    bool lacks() const { return std::isnan(spread); }
};

// Enough for a sum to show that a maximum came late.
KDFAST_INLINE V at_most_128(V x) { return exp2_overflows ? x : min(set1(128), x); }

// Two vectors at a time of one distribution's sums: at tau, and of the student at 1.
template <Tau T, Observe O = Observe::no>
struct LaneSums {
    V c, from, from_one;
    V tau0 = set1(0), tau1 = set1(0), one0 = set1(0), one1 = set1(0);
    V spread = set1(0), top = set1(-infinity);

    LaneSums(const Sums& sums, float scale)
        : c(set1(scale)), from(set1(-sums.reference(scale))), from_one(set1(-sums.reference(log2e))) {}

    KDFAST_INLINE V exponent_of(V x) const { return affine(x, c, from); }
    template <Observe This = O>
    KDFAST_INLINE V add(V x, V exponent, V& tau, V& one) {
        const V e = exp2(at_most_128(exponent));
        tau = tau + e;
        if constexpr (This != Observe::no) {
            // Where the exponent is below -200, e is 0; at -inf their product is NaN.
            spread = fma(e, This == Observe::any ? max(exponent, set1(-200)) : exponent, spread);
            top = max(x, top);
        }
        if constexpr (T == Tau::two) one = fma(e, e, one);
        if constexpr (T == Tau::other) one = one + exp2(at_most_128(affine(x, set1(log2e), from_one)));
        return e;
    }
    TileSums sums() const {
        const float at_tau = hsum(tau0 + tau1);
        TileSums sums = {at_tau, T == Tau::one ? at_tau : hsum(one0 + one1)};
        if constexpr (O != Observe::no) {
            sums.spread = hsum(spread);
            sums.top = hmax(top);
        }
        return sums;
    }
};

template <class Io, Tau T, Observe O>
TileSums sum_tile(const typename Io::Element* z, std::int64_t n, float c, const Sums& sums, Ahead next) {
    LaneSums<T, O> s(sums, c);
    const auto add = [&]<Observe This>(Pair x) KDFAST_INLINE_LAMBDA {
        s.template add<This>(x.first, s.exponent_of(x.first), s.tau0, s.one0);
        s.template add<This>(x.second, s.exponent_of(x.second), s.tau1, s.one1);
    };
    const std::int64_t whole = n / step * step;
    for (std::int64_t i = 0; i < whole; i += step) {
        next.template fetch<Io>(i);
        add.template operator()<O>(Io::get(z + i));
    }
    Tail<Io> tail;
    if (whole < n) add.template operator()<with_absent<O>>(Io::get(tail.fill(z + whole, n - whole)));
    return s.sums();
}

// One logit's exponential at temperature 1, rounded as where a tile was summed.
template <Tau T>
double at_one(float logit, const Sums& sums, float c) {
    LaneSums<T> s(sums, c);
    s.add(set1(logit), s.exponent_of(set1(logit)), s.tau0, s.one0);
    float lanes[width];
    store(lanes, T == Tau::one ? s.tau0 : s.one0);
    return lanes[0];
}

// The distribution whose exponentials weigh the distances in `cross`.
enum class Cross : std::uint8_t { none, student, teacher };

struct PairSums {
    TileSums student, teacher;
    bool overflowed() const { return student.overflowed() || teacher.overflowed(); }
    bool lacks() const { return student.lacks() || teacher.lacks(); }
};

template <class Io, Tau T, Cross X, Observe O>
PairSums sum_pair(const typename Io::Element* z, const typename Io::Element* t, std::int64_t n, float c,
                  const Sums& student, const Sums& teacher, Ahead next_z, Ahead next_t) {
    LaneSums<T, O> p(student, c);
    LaneSums<Tau::one, O> q(teacher, c);
    V cross = set1(0);
    const auto add = [&]<Observe This>(V x, V y, V& p_tau, V& p_one, V& q_tau) KDFAST_INLINE_LAMBDA {
        const V u = p.exponent_of(x), v = q.exponent_of(y);
        const V e_z = p.template add<This>(x, u, p_tau, p_one), e_t = q.template add<This>(y, v, q_tau, q_tau);
        if constexpr (X == Cross::student) cross = add_times(cross, e_z, u - v);
        if constexpr (X == Cross::teacher) cross = add_times(cross, e_t, v - u);
    };
    const auto add_both = [&]<Observe This>(Pair x, Pair y) KDFAST_INLINE_LAMBDA {
        add.template operator()<This>(x.first, y.first, p.tau0, p.one0, q.tau0);
        add.template operator()<This>(x.second, y.second, p.tau1, p.one1, q.tau1);
    };
    const std::int64_t whole = n / step * step;
    for (std::int64_t i = 0; i < whole; i += step) {
        next_z.template fetch<Io>(i);
        next_t.template fetch<Io>(i);
        add_both.template operator()<O>(Io::get(z + i), Io::get(t + i));
    }
    Tail<Io> z_tail, t_tail;
    if (whole < n)
        add_both.template operator()<with_absent<O>>(Io::get(z_tail.fill(z + whole, n - whole)),
                                                     Io::get(t_tail.fill(t + whole, n - whole)));
    PairSums sums = {p.sums(), q.sums()};
    if constexpr (X != Cross::none) (X == Cross::student ? sums.student : sums.teacher).cross = hsum(cross);
    return sums;
}

// The first columns' maximum serves all that follow until a sum overflows: looking for a maximum in each tile would
// cost a pass.
template <class Io>
void begin_sums(const typename Io::Element* z, std::int64_t n, float c, Sums& sums) {
    if (sums.max == -infinity) sums.rescale(max_of<Io>(z, std::min<std::int64_t>(n, 4 * step)), c);
    if (sums.max == -infinity) sums.rescale(max_of<Io>(z, n), c);
}

// Has a tile summed as an observer asks. A logit of -inf shows as a spread that is not a number: then, and for what
// follows in the row, the sums are those that may meet one.
template <class Sum>
auto observed(bool observe, bool& absent, Sum sum) {
    if (!observe) return sum.template operator()<Observe::no>();
    if (!absent) {
        const auto sums = sum.template operator()<Observe::present>();
        absent = sums.lacks();
        if (!absent) return sums;
    }
    return sum.template operator()<Observe::any>();
}

// The columns begin at `start` in their row.
template <class Io, Tau T>
void add_tile(const typename Io::Element* z, std::int64_t start, std::int64_t n, float c, bool observe, Sums& sums,
              Ahead next) {
    begin_sums<Io>(z, n, c, sums);
    const auto sum = [&] {
        return observed(observe, sums.absent, [&]<Observe O>() { return sum_tile<Io, T, O>(z, n, c, sums, next); });
    };
    TileSums tile_sums = sum();
    if (tile_sums.overflowed()) {  // or NaN, which stays
        sums.rescale(max_of<Io>(z, n), c);
        tile_sums = sum();
    }
    sums.at_tau += tile_sums.at_tau;
    sums.at_one += tile_sums.at_one;
    sums.spread += tile_sums.spread;
    sums.see(tile_sums.top, start);
}

template <class Io, Tau T, Cross X>
void add_pair(const typename Io::Element* z, const typename Io::Element* t, std::int64_t start, std::int64_t n, float c,
              bool observe, Sums& student, Sums& teacher, Ahead next_z, Ahead next_t) {
    begin_sums<Io>(z, n, c, student);
    begin_sums<Io>(t, n, c, teacher);
    const auto sum = [&] {
        return observed(observe, student.absent, [&]<Observe O>() {
            return sum_pair<Io, T, X, O>(z, t, n, c, student, teacher, next_z, next_t);
        });
    };
    PairSums s = sum();
    if (s.overflowed()) {
        student.rescale(max_of<Io>(z, n), c);
        teacher.rescale(max_of<Io>(t, n), c);
        s = sum();
    }
    const auto add = [c, start](Sums& to, const TileSums& from, const Sums& other, bool crossed) {
        to.at_tau += from.at_tau;
        to.at_one += from.at_one;
        to.spread += from.spread;
        to.see(from.top, start);
        if (!crossed) return;
        const double shift = static_cast<double>(to.reference(c)) - other.reference(c);
        to.cross += from.cross + shift * from.at_tau;
    };
    add(student, s.student, teacher, X == Cross::student);
    add(teacher, s.teacher, student, X == Cross::teacher);
}

// Of the distances to a logit of the row, so that lanes of fp32 keep their digits whatever the level.
void add_smoothing(const float* z, std::int64_t n, const Sums& near, Smoothing& s) {
    const float at = Sums::reference(near.max, 1);
    V sum = set1(0), present = set1(0);
    for (std::int64_t i = 0; i < n; i += width) {
        const V x = load(z + i);
        const M there = less(set1(-infinity), x);
        sum = sum + select(there, x - set1(at), set1(0));
        present = present + select(there, set1(1), set1(0));
    }
    const double count = hsum(present);
    s.sum += hsum(sum) + count * at;
    s.present += count;
}

// --- Passes 2 and 3: the value and the gradient

// What is known of a row once pass 1 is over, as it is saved for a later backward call.
struct RowState {
    Normaliser at_tau;  // of z / tau over the distilled columns
    Normaliser at_one;  // of z over all columns
    float sum_student;  // of student(column), which pull() subtracts
    float present;      // columns whose logit is not -inf; counted for label smoothing only
};

struct RowConstants {
    float c;  // log2e / tau
    RowState state;
    Normaliser teacher = {0, 0};  // as here, and teacher_c = 1, where the tile holds log2 q already
    float teacher_c = 1;
    float c_soft = 0;      // c_soft * weight / tau
    float pull = 0;        // the same times tau dD/dz over p, where that is one number (sparse targets)
    float c_one = 0;       // factor of softmax(z): c_hard + 2 c_z logsumexp(z)
    bool streamed = true;  // how the gradient is written, see tiles.h
    float one_from_p = 0;  // Tau::one: softmax(z) = p * this; Tau::two: p^2 * this
    bool sided = false;    // `offset` is known, and z and t are what it is of
    double offset = 0;     // D of sides.h
};

struct Value {
    double value = 0, student = 0;
    double student_u = 0, p_u = 0, teacher = 0, teacher_v = 0, q_v = 0;  // for dD/dtau

    void operator+=(const Value& o) {
        value += o.value;
        student += o.student;
        student_u += o.student_u;
        p_u += o.p_u;
        teacher_v += o.teacher_v;
        q_v += o.q_v;
        teacher += o.teacher;
    }
};

enum class Want : std::uint8_t { value, value_and_dtau, gradient, value_and_gradient };

template <class Io, class D, Tau T, Want W>
void visit(const D& divergence, const typename Io::Element* z, const typename Io::Element* t, std::int64_t n,
           const RowConstants& row, Ahead next_z, Ahead next_t, typename Io::Element* g, Value& sums) {
    constexpr bool wants_gradient = W == Want::gradient || W == Want::value_and_gradient;
    const RowState& state = row.state;
    const Correction p_scale(state.at_tau.lo), q_scale(row.teacher.lo), one_scale(state.at_one.lo);
    const V c = set1(row.c), p_from = set1(-state.at_tau.hi), p_lo = set1(state.at_tau.lo);
    const V tc = set1(row.teacher_c), q_from = set1(-row.teacher.hi), q_lo = set1(row.teacher.lo);
    const V one_from = set1(-state.at_one.hi), c_soft = set1(row.c_soft), c_one = set1(row.c_one);
    const V one_from_p = set1(row.one_from_p * row.c_one), sum_student = set1(state.sum_student);
    const V d_lo = set1(ln2 * (state.at_tau.lo - row.teacher.lo));
    const Offset offset(row.offset);
    V value = set1(0), total = value, student_u = value, p_u = value, teacher = value, teacher_v = value, q_v = value;
    const auto column = [&](V raw, V target) KDFAST_INLINE_LAMBDA {  // its gradient
        const V u = affine(raw, c, p_from), v = affine(target, tc, q_from);
        Column col;
        col.u = u - p_lo;
        col.v = v - q_lo;
        col.p = exp2(u, p_scale);
        col.q = exp2(v, q_scale);
        col.d = fma(v - u, set1(ln2), d_lo);
        col.side = col.p - col.q;
        if (row.sided) {  // where a logit is infinite, p or q is 0, and their difference has their sign
            const V side = offset.less(raw, target);
            col.side = select(less(abs(side), set1(infinity)), side, col.side);
        }
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
        if constexpr (!wants_gradient) return set1(0);
        V one;
        if constexpr (T == Tau::one) one = col.p * one_from_p;
        if constexpr (T == Tau::two) one = col.p * (col.p * one_from_p);
        if constexpr (T == Tau::other) one = exp2(affine(raw, set1(log2e), one_from), one_scale) * c_one;
        return fma(c_soft, divergence.pull(col, sum_student), one);
    };
    Tail<Io> z_tail, t_tail, g_tail;
    for (std::int64_t i = 0; i < n; i += step) {
        const bool whole = i + step <= n;
        next_z.template fetch<Io>(i);
        next_t.template fetch<Io>(i);
        const Pair x = Io::get(whole ? z + i : z_tail.fill(z + i, n - i));
        const Pair y = Io::get(whole ? t + i : t_tail.fill(t + i, n - i));
        const Pair gradient = {column(x.first, y.first), column(x.second, y.second)};
        if constexpr (wants_gradient) {
            Io::put(whole ? g + i : g_tail.values, gradient, whole && row.streamed);
            if (!whole) std::copy_n(g_tail.values, n - i, g + i);
        }
    }
    if constexpr (W != Want::gradient) sums.value += hsum(value);
    sums.student += hsum(total);
    if constexpr (W == Want::value_and_dtau) {
        sums.student_u += hsum(student_u);
        sums.p_u += hsum(p_u);
        sums.teacher_v += hsum(teacher_v);
        sums.q_v += hsum(q_v);
        sums.teacher += hsum(teacher);
    }
}

// The gradient of a row without a teacher's logits: p at tau times `pull`, and softmax(z) times c_one.
template <class Io, Tau T>
void visit_student(const typename Io::Element* z, std::int64_t n, const RowConstants& row, float pull, Ahead next,
                   typename Io::Element* g) {
    const RowState& state = row.state;
    const Correction p_scale(state.at_tau.lo), one_scale(state.at_one.lo);
    const V c = set1(row.c), p_from = set1(-state.at_tau.hi), one_from = set1(-state.at_one.hi);
    const V of_p = set1(T == Tau::one ? pull + row.one_from_p * row.c_one : pull);
    const V of_square = set1(row.one_from_p * row.c_one), c_one = set1(row.c_one);
    const auto column = [&](V raw) KDFAST_INLINE_LAMBDA {
        const V p = exp2(affine(raw, c, p_from), p_scale);
        if constexpr (T == Tau::one) return p * of_p;
        if constexpr (T == Tau::two) return p * fma(p, of_square, of_p);
        return fma(exp2(affine(raw, set1(log2e), one_from), one_scale), c_one, p * of_p);
    };
    Tail<Io> z_tail, g_tail;
    for (std::int64_t i = 0; i < n; i += step) {
        const bool whole = i + step <= n;
        next.template fetch<Io>(i);
        const Pair x = Io::get(whole ? z + i : z_tail.fill(z + i, n - i));
        Io::put(whole ? g + i : g_tail.values, {column(x.first), column(x.second)}, whole && row.streamed);
        if (!whole) std::copy_n(g_tail.values, n - i, g + i);
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
    const Correction scale(row.state.at_one.lo);
    const V from = set1(-row.state.at_one.hi), c = set1(row.c_one);
    for (std::int64_t i = 0; i < n; i += width) store(g + i, exp2(affine(load(z + i), set1(log2e), from), scale) * c);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
