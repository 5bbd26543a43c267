// A teacher of K kept columns a row, between pass 1 and the gradient. Included by dense_kernel.cpp, once per ISA.
//
// The kept columns, and where the rule has one the tail, are outcomes of two distributions p and q like the columns of
// a dense row; with S = sum student over them,
//   kept column    tau dD/dz = student - p S
//   another one    tau dD/dz = p (student_tail / p_tail - S), as its share of the tail is p / p_tail
// so the row's gradient is p times one number, but for the kept columns.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

// One row's kept columns. Arrays are padded to whole vectors of columns without mass.
struct Kept {
    std::vector<std::int32_t> ids;  // -1: none
    std::vector<float> z, u, v;     // the logit; log2 p and log2 q at tau, or the weight in place of log2 q
    std::vector<float> gradient;    // tau dD/dz
    double value = 0;
    float pull = 0;  // of the other columns: tau dD/dz over p

    explicit Kept(std::int64_t count)
        : ids(size(count), -1), z(size(count)), u(size(count)), v(size(count)), gradient(size(count)) {}

    // With one more for the tail.
    static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(padded(count + 1)); }
};

// Where p_tail = 1 - sum p has lost its digits, it is summed anew from the columns themselves.
constexpr double tail_needs_sum = 1e-3;

// 1 - sum q as what the largest of the entries lacks of 1 less the sum of the others: a small one keeps its digits.
class MassLeft {
  public:
    void add(double log_q) {
        const bool larger = log_q > largest_;
        others_ += std::exp(larger ? largest_ : log_q);
        if (larger) largest_ = log_q;
    }
    double get() const { return -std::expm1(largest_) - others_; }

  private:
    double largest_ = -std::numeric_limits<double>::infinity();
    double others_ = 0;
};

template <class D>
struct SparseRow {
    const D& divergence;
    const SparseTargets& targets;
    std::int64_t taught;  // columns
    float temperature;
    float c;  // log2e / tau

    // Fills `kept` from a row's logits, of which `logit` reads one; `other_mass` gives the sum of p over the columns
    // that were not kept.
    template <class Logit, class OtherMass>
    void outcomes(std::int64_t i, const RowState& state, Logit logit, OtherMass other_mass, Kept& kept) const {
        MassLeft q_tail;
        const bool complete = read(i, state, logit, kept, q_tail) == taught;  // nothing was left out
        if (targets.rule == TailRule::zero || targets.rule == TailRule::drawn) return plain(i, kept);
        double p_sum = 0, q_sum = 0;
        for_vectors(kept, [&](std::size_t k) { p_sum += hsum(exp2(load(&kept.u[k]))); });
        if (targets.rule == TailRule::renorm) {
            for_vectors(kept, [&](std::size_t k) { q_sum += hsum(exp2(load(&kept.v[k]))); });
            const auto log2_sum = static_cast<float>(std::log2(q_sum));
            for_vectors(kept, [&](std::size_t k) { store(&kept.v[k], load(&kept.v[k]) - set1(log2_sum)); });
        }
        const auto at = static_cast<std::size_t>(targets.kept);
        double p_tail = complete ? 0 : 1 - p_sum;
        if (!complete && p_tail < tail_needs_sum) p_tail = other_mass();
        kept.u[at] = log2_of(p_tail, complete);
        kept.v[at] = targets.rule == TailRule::renorm ? -infinity : log2_of(q_tail.get(), complete);
        V value = set1(0);
        double sum_student = 0;
        for_vectors(kept, [&](std::size_t k) {
            const Column column = at_outcome(kept, k);
            const V student = divergence.student(column);
            value = value + divergence.value(column);
            sum_student += hsum(student);
            store(&kept.gradient[k], student);
        });
        kept.value = hsum(value);
        for_vectors(kept, [&](std::size_t k) {
            const V p = exp2(load(&kept.u[k]));
            store(&kept.gradient[k], fnma(p, set1(static_cast<float>(sum_student)), load(&kept.gradient[k])));
        });
        const float p_last = std::exp2(kept.u[at]);
        kept.pull = p_last > 0 ? kept.gradient[at] / p_last : 0;
    }

  private:
    template <class Use>
    void for_vectors(const Kept& kept, Use use) const {
        for (std::size_t k = 0; k < kept.z.size(); k += width) use(k);
    }

    // Reads the entries in use, and of a rule with a bucket what they leave; returns how many there are.
    template <class Logit>
    std::int64_t read(std::int64_t i, const RowState& state, Logit logit, Kept& kept, MassLeft& left) const {
        const std::int32_t* ids = targets.ids + i * targets.kept;
        const float* values = targets.values + i * targets.kept;
        std::fill(kept.ids.begin(), kept.ids.end(), -1);
        std::fill(kept.z.begin(), kept.z.end(), -infinity);
        const bool drawn = targets.rule == TailRule::drawn;
        std::fill(kept.v.begin(), kept.v.end(), drawn ? 0.0f : -infinity);
        const double lse = !drawn && targets.per_row ? targets.per_row[i] : 0;
        std::int64_t used = 0;
        for (std::int64_t k = 0; k < targets.kept; ++k) {
            if (ids[k] < 0 || ids[k] >= taught) continue;
            const auto n = static_cast<std::size_t>(k);
            ++used;
            kept.ids[n] = ids[k];
            kept.z[n] = logit(ids[k]);
            if (drawn) {
                kept.v[n] = values[k];
                continue;
            }
            const double log_q = static_cast<double>(values[k]) / static_cast<double>(temperature) - lse;
            kept.v[n] = static_cast<float>(log_q * log2e_exact);
            if (targets.rule == TailRule::bucket) left.add(log_q);
        }
        const V lo = set1(state.at_tau.lo), from = set1(-state.at_tau.hi);
        for_vectors(kept, [&](std::size_t k) { store(&kept.u[k], affine(load(&kept.z[k]), set1(c), from) - lo); });
        return used;
    }

    // Sum over the kept columns of w (log q - log p): q itself is the weight, or a drawn one and its entropy is known.
    void plain(std::int64_t i, Kept& kept) const {
        const bool drawn = targets.rule == TailRule::drawn;
        V value = set1(0), mass = set1(0);
        for_vectors(kept, [&](std::size_t k) {
            const V v = load(&kept.v[k]), u = load(&kept.u[k]);
            const V w = drawn ? v : exp2(v);
            value = value + times(w, drawn ? set1(0) - u : v - u);
            mass = mass + w;
            store(&kept.gradient[k], w);
        });
        kept.pull = hsum(mass);
        kept.value = static_cast<double>(hsum(value)) * static_cast<double>(ln2) +
                     (drawn && targets.per_row ? static_cast<double>(targets.per_row[i]) : 0);
        for_vectors(kept, [&](std::size_t k) {
            store(&kept.gradient[k], exp2(load(&kept.u[k])) * set1(kept.pull) - load(&kept.gradient[k]));
        });
    }

    // A tail that ought to be there has mass, however little its sum has left of it.
    static float log2_of(double mass, bool complete) {
        if (std::isnan(mass)) return std::numeric_limits<float>::quiet_NaN();
        return complete ? -infinity : static_cast<float>(std::log2(std::max(mass, 0x1p-120)));
    }

    static Column at_outcome(const Kept& kept, std::size_t k) {
        Column column;
        column.u = load(&kept.u[k]);
        column.v = load(&kept.v[k]);
        column.p = exp2(column.u);
        column.q = exp2(column.v);
        column.d = (column.v - column.u) * set1(ln2);
        column.side = column.p - column.q;
        return column;
    }
};

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
