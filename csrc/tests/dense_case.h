// A call of the dense loss on random numbers, the memory behind it, and its checks against the oracle.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "dense_oracle.h"
#include "harness.h"
#include "matrix.h"

namespace kdfast::test {

using cpu::Divergence;
using cpu::Term;

inline constexpr double infinity = std::numeric_limits<double>::infinity();
inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
inline constexpr float nan32 = std::numeric_limits<float>::quiet_NaN();
inline constexpr std::array dtypes = {DType::f32, DType::bf16, DType::f16};
inline constexpr std::array dtype_names = {"f32", "bf16", "f16"};

inline const std::vector<Term> every_term = {
    {Divergence::forward_kl, 1, 0},
    {Divergence::reverse_kl, 0.8f, 0},
    {Divergence::jsd, 1, 0.3f},
    {Divergence::skew_forward_kl, 1, 0.1f},
    {Divergence::skew_reverse_kl, 1.5f, 0.2f},
    {Divergence::tvd, 1, 0},
    {Divergence::alpha_div, 1, 0.4f},
    {Divergence::hellinger, 2, 0},
};

template <class Body>
void for_each_isa(Body body) {
    for (const cpu::Isa& isa : cpu::isa_table()) {
        if (!isa.supported()) continue;
        const Scope scope{std::string(isa.name)};
        body(*isa.kernels);
    }
}

inline double uniform(Random& random, double low, double high) {
    return std::uniform_real_distribution(low, high)(random);
}
inline std::int64_t integer(Random& random, std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution(low, high)(random);
}

struct Outputs {
    std::vector<float> soft, hard, z2, stats;
    std::vector<float> dtau;       // empty where it was not asked for
    std::vector<double> observed;  // likewise
    std::vector<std::uint32_t> grad;

    // Bits, so that NaN equals NaN.
    bool same(const Outputs& other, bool stats_too = true) const {
        const auto equal = [](const auto& a, const auto& b) {
            return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
        };
        return equal(soft, other.soft) && equal(hard, other.hard) && equal(z2, other.z2) &&
               (!stats_too || equal(stats, other.stats)) && equal(dtau, other.dtau) &&
               equal(observed, other.observed) && grad == other.grad;
    }
};

// K kept columns a row, in memory of exactly their size.
struct Targets {
    cpu::TailRule rule;
    std::int64_t kept;
    std::int64_t columns;           // of the teacher
    std::vector<std::int32_t> ids;  // (rows, kept), as values are
    std::vector<float> values;
    std::vector<float> per_row;  // empty: zeros
};

// A call and the memory behind it: logits drawn at random, everything else as its defaults say until a test sets it.
struct Case {
    std::int64_t rows, columns;
    std::int64_t distilled;  // columns of the distillation term
    Matrix student;
    cpu::Cap student_cap;
    std::vector<Matrix> teachers;
    std::vector<cpu::Cap> teacher_caps;
    std::optional<Targets> targets;  // in place of teachers
    std::vector<Term> terms = {{Divergence::forward_kl, 1, 0}};
    float temperature = 1;
    bool mix_logits = false;
    bool weights_per_row = false;
    std::vector<float> weights;  // of teachers: (n) or (n, rows)
    std::vector<std::int64_t> labels;
    std::unique_ptr<bool[]> counted;
    float smoothing = 0;
    std::vector<float> c_soft, c_hard, c_z;
    DType grad_dtype;
    Layout layout;
    int threads = 1;
    bool observes = false;

    Case(Random& random, std::int64_t rows_, std::int64_t columns_, DType dtype, std::size_t teacher_count = 1,
         Layout layout_ = guarded)
        : rows(rows_),
          columns(columns_),
          distilled(columns_),
          student(dtype, rows_, columns_, layout_),
          grad_dtype(dtype),
          layout(layout_) {
        std::normal_distribution<double> normal;
        for (std::size_t k = 0; k < teacher_count; ++k) {
            teachers.emplace_back(dtypes[integer(random, 0, 2)], rows, columns, layout);
            weights.push_back(static_cast<float>(uniform(random, 0.2, 1)));
        }
        float total = 0;
        for (float w : weights) total += w;
        for (float& w : weights) w /= total;
        // Teachers are near the student in some rows, where a divergence is small, and far in others.
        for (std::int64_t i = 0; i < rows; ++i) {
            const double spread = uniform(random, 0.5, 4), distance = std::pow(10, uniform(random, -3, 0.5));
            for (std::int64_t c = 0; c < columns; ++c) {
                const double z = spread * normal(random);
                student.set(i, c, z);
                for (Matrix& t : teachers) t.set(i, c, z + distance * normal(random));
            }
            labels.push_back(integer(random, 0, columns - 1));
            c_soft.push_back(static_cast<float>(uniform(random, -1, 2)));
            c_hard.push_back(static_cast<float>(uniform(random, -1, 2)));
            c_z.push_back(static_cast<float>(uniform(random, -0.1, 0.1)));
        }
    }

    cpu::DenseCall call() const {
        cpu::DenseCall a;
        a.rows = rows;
        a.columns = distilled;
        a.student = student.rows();
        a.student_cap = student_cap;
        a.teacher_caps = teacher_caps;
        for (const Matrix& t : teachers) a.teachers.push_back(t.rows());
        a.teacher_weights = weights.empty() ? nullptr : weights.data();
        a.teacher_weights_stride = weights_per_row ? rows : 1;
        a.teacher_weights_per_row = weights_per_row;
        a.mix_logits = mix_logits;
        if (targets) {
            static constexpr std::int32_t nothing = -1;
            a.sparse.ids = targets->ids.empty() ? &nothing : targets->ids.data();
            a.sparse.values = targets->values.data();
            a.sparse.per_row = targets->per_row.empty() ? nullptr : targets->per_row.data();
            a.sparse.kept = targets->kept;
            a.sparse.columns = targets->columns;
            a.sparse.rule = targets->rule;
        }
        if (a.taught()) a.terms = terms;
        a.temperature = temperature;
        a.labels = labels.empty() ? nullptr : labels.data();
        a.counted = counted.get();
        a.label_smoothing = smoothing;
        a.c_soft = a.taught() ? c_soft.data() : nullptr;
        a.c_hard = labels.empty() ? nullptr : c_hard.data();
        a.c_z = c_z.data();
        a.threads = threads;
        return a;
    }

    // Forward with the gradient, into memory that is full of NaN before and between canaries.
    Outputs run(const cpu::Kernels& kernels, bool with_dtau = false) const {
        cpu::DenseCall a = call();
        Outputs out = fresh(a, with_dtau);
        bind(a, out);
        Matrix grad(grad_dtype, rows, columns, layout);
        grad.fill(not_a_number);
        a.grad = grad.rows();
        kernels.forward(a);
        CHECK(grad.guards_hold());
        out.grad = grad.all_bits();
        return out;
    }

    // The same by way of the statistics: a forward without gradient, then a backward.
    Outputs run_twice(const cpu::Kernels& kernels) const {
        cpu::DenseCall a = call();
        Outputs out = fresh(a, false);
        bind(a, out);
        kernels.forward(a);
        Matrix grad(grad_dtype, rows, columns, layout);
        grad.fill(not_a_number);
        cpu::DenseCall b = call();
        b.stats = out.stats.data();
        b.grad = grad.rows();
        const std::vector<float> before = out.stats;
        kernels.backward(b);
        CHECK(before.empty() || std::memcmp(before.data(), out.stats.data(), before.size() * sizeof(float)) == 0);
        CHECK(grad.guards_hold());
        out.grad = grad.all_bits();
        return out;
    }

    // The gradient over the student's own memory, which is put back afterwards.
    std::vector<std::uint32_t> run_in_place(const cpu::Kernels& kernels) {
        const std::vector<std::uint32_t> before = student.all_bits();
        cpu::DenseCall a = call();
        Outputs out = fresh(a, false);
        bind(a, out);
        a.grad = student.rows();
        kernels.forward(a);
        CHECK(student.guards_hold());
        std::vector<std::uint32_t> grad = student.all_bits();
        for (std::size_t n = 0; n < before.size(); ++n)
            student.set_bits(static_cast<std::int64_t>(n) / columns, static_cast<std::int64_t>(n) % columns, before[n]);
        return grad;
    }

    OracleRow oracle(std::int64_t i) const {
        OracleRow o;
        o.z = capped(student_cap, student.row(i, columns));
        for (std::size_t k = 0; k < teachers.size(); ++k)
            o.teachers.push_back(
                capped(teacher_caps.empty() ? cpu::Cap{} : teacher_caps[k], teachers[k].row(i, distilled)));
        for (std::size_t k = 0; k < teachers.size(); ++k)
            o.weights.push_back(static_cast<double>(
                weights_per_row ? weights[k * static_cast<std::size_t>(rows) + static_cast<std::size_t>(i)]
                                : weights[k]));
        const auto n = static_cast<std::size_t>(i);
        if (teachers.size() == 1 && !mix_logits) o.weights = {1};  // a single teacher's weight is not read
        o.mix_logits = mix_logits;
        o.terms = terms;
        o.temperature = static_cast<double>(temperature);
        if (!labels.empty()) o.label = labels[n];
        o.smoothing = static_cast<double>(smoothing);
        o.c_soft = static_cast<double>(c_soft[n]);
        o.c_hard = static_cast<double>(c_hard[n]);
        o.c_z = static_cast<double>(c_z[n]);
        return o;
    }

    void check(const Outputs& out) const {
        for (std::int64_t i = 0; i < rows; ++i)
            if (!counted || counted[i]) check_row(out, i);
    }

    // fp32 has 6e-8; a logit of 20 over tau is good to 1e-6 in the exponent, and sums add to that.
    void check_row(const Outputs& out, std::int64_t i) const {
        const Scope scope(text("row ", i, " of ", columns, " columns, tau ", temperature));
        const OracleRow o = oracle(i);
        const auto n = static_cast<std::size_t>(i);
        const auto close = [](double truth) { return 4e-6 * std::abs(truth) + 3e-6; };
        if (!teachers.empty()) CHECK_NEAR(static_cast<double>(out.soft[n]), o.soft(), close(o.soft()));
        if (!labels.empty()) CHECK_NEAR(static_cast<double>(out.hard[n]), o.hard(), close(o.hard()));
        CHECK_NEAR(static_cast<double>(out.z2[n]), o.z2(), close(o.z2()));
        const OracleRow::Gradient truth = o.gradient();
        // The total variation's gradient jumps where p = q, and which side fp32 is on is not for it to know.
        const bool jumps =
            std::any_of(terms.begin(), terms.end(), [](const Term& t) { return t.kind == Divergence::tvd; });
        const Vector ratios = jumps && !teachers.empty() ? o.log_ratios() : Vector{};
        const Vector log_p = ratios.empty() ? Vector{} : log_softmax(o.distilled(), o.temperature);
        const auto tie = [&](std::size_t c) { return c < ratios.size() && ratios[c] < 4e-6; };
        double tied = 0;  // their mass, which every column's gradient sees
        for (std::size_t c = 0; c < ratios.size(); ++c) tied += tie(c) ? std::exp(log_p[c]) : 0;
        if (!out.dtau.empty()) {
            // A tied column adds d(p - q) / dtau or takes it away; p moves by p_j (mean - z_j) / tau^2, and q likewise.
            double furthest = 0;
            for (std::size_t c = 0; tied > 0 && c < ratios.size(); ++c)
                if (std::isfinite(log_p[c]) && std::isfinite(ratios[c]))
                    furthest = std::max(furthest, std::abs(log_p[c]) + ratios[c]);
            const double jump = 4 * tied * furthest / static_cast<double>(temperature);
            CHECK_NEAR(static_cast<double>(out.dtau[n]), o.dsoft_dtemperature(),
                       3e-5 * (1 + std::abs(o.dsoft_dtemperature())) + jump);
        }
        const double half_unit = std::ldexp(0.5, 1 - format_of(grad_dtype).digits);
        const double smallest = std::ldexp(1.0, format_of(grad_dtype).min_exponent - format_of(grad_dtype).digits + 1);
        for (std::int64_t c = 0; c < columns; ++c) {
            const double got =
                decoded(grad_dtype, out.grad[n * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c)]);
            const double expected =
                truth.value[static_cast<std::size_t>(c)] * slope(student_cap, o.z[static_cast<std::size_t>(c)]);
            const double tolerance = (3e-6 + tied) * truth.magnitude[static_cast<std::size_t>(c)] *
                                         std::abs(static_cast<double>(student_cap.scale)) +
                                     1.01 * half_unit * std::abs(expected) + smallest + 1.2e-38;
            if (!tie(static_cast<std::size_t>(c)))
                check_near(__FILE__, __LINE__, text("gradient of column ", c).c_str(), got, expected, tolerance);
        }
    }

  private:
    Outputs fresh(const cpu::DenseCall& a, bool with_dtau) const {
        const auto n = static_cast<std::size_t>(rows);
        Outputs out;
        for (std::vector<float>* v : {&out.soft, &out.hard, &out.z2}) v->assign(n, nan32);
        out.stats.assign(n * static_cast<std::size_t>(a.stats_per_row()), nan32);
        if (with_dtau) out.dtau.assign(n, nan32);
        if (observes) out.observed.assign(n * static_cast<std::size_t>(a.observed_per_row), not_a_number);
        return out;
    }
    void bind(cpu::DenseCall& a, Outputs& out) const {
        a.soft = a.taught() ? out.soft.data() : nullptr;
        a.hard = labels.empty() ? nullptr : out.hard.data();
        a.z2 = out.z2.data();
        a.stats = out.stats.data();
        a.dsoft_dtemperature = out.dtau.empty() ? nullptr : out.dtau.data();
        a.observed = out.observed.empty() ? nullptr : out.observed.data();
    }
};

}  // namespace kdfast::test
