// The kernels of every instruction set against the oracle.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "dense_oracle.h"
#include "harness.h"
#include "matrix.h"

using namespace kdfast;
using namespace kdfast::test;
using cpu::Divergence;
using cpu::Term;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr float nan32 = std::numeric_limits<float>::quiet_NaN();
constexpr std::array dtypes = {DType::f32, DType::bf16, DType::f16};
constexpr std::array dtype_names = {"f32", "bf16", "f16"};

const std::vector<Term> every_term = {
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

double uniform(Random& random, double low, double high) { return std::uniform_real_distribution(low, high)(random); }
std::int64_t integer(Random& random, std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution(low, high)(random);
}

struct Outputs {
    std::vector<float> soft, hard, z2, stats;
    std::vector<float> dtau;  // empty where it was not asked for
    std::vector<std::uint32_t> grad;

    // Bits, so that NaN equals NaN.
    bool same(const Outputs& other, bool stats_too = true) const {
        const auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
            return a.size() == b.size() &&
                   (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
        };
        return equal(soft, other.soft) && equal(hard, other.hard) && equal(z2, other.z2) &&
               (!stats_too || equal(stats, other.stats)) && equal(dtau, other.dtau) && grad == other.grad;
    }
};

// A call and the memory behind it: logits drawn at random, everything else as its defaults say until a test sets it.
struct Case {
    std::int64_t rows, columns;
    std::int64_t distilled;  // columns of the distillation term
    Matrix student;
    std::vector<Matrix> teachers;
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
        for (const Matrix& t : teachers) a.teachers.push_back(t.rows());
        a.teacher_weights = weights.empty() ? nullptr : weights.data();
        a.teacher_weights_stride = weights_per_row ? rows : 1;
        a.teacher_weights_per_row = weights_per_row;
        a.mix_logits = mix_logits;
        if (!teachers.empty()) a.terms = terms;
        a.temperature = temperature;
        a.labels = labels.empty() ? nullptr : labels.data();
        a.counted = counted.get();
        a.label_smoothing = smoothing;
        a.c_soft = teachers.empty() ? nullptr : c_soft.data();
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
        o.z = student.row(i, columns);
        for (const Matrix& t : teachers) o.teachers.push_back(t.row(i, distilled));
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
        if (!out.dtau.empty())
            CHECK_NEAR(static_cast<double>(out.dtau[n]), o.dsoft_dtemperature(),
                       3e-5 * (1 + std::abs(o.dsoft_dtemperature())));
        const OracleRow::Gradient truth = o.gradient();
        // The total variation's gradient jumps where p = q, and which side fp32 is on is not for it to know.
        const bool jumps =
            std::any_of(terms.begin(), terms.end(), [](const Term& t) { return t.kind == Divergence::tvd; });
        const Vector ratios = jumps && !teachers.empty() ? o.log_ratios() : Vector{};
        const Vector log_p = ratios.empty() ? Vector{} : log_softmax(o.distilled(), o.temperature);
        const auto tie = [&](std::size_t c) { return c < ratios.size() && ratios[c] < 4e-6; };
        double tied = 0;  // their mass, which every column's gradient sees
        for (std::size_t c = 0; c < ratios.size(); ++c) tied += tie(c) ? std::exp(log_p[c]) : 0;
        const double half_unit = std::ldexp(0.5, 1 - format_of(grad_dtype).digits);
        const double smallest = std::ldexp(1.0, format_of(grad_dtype).min_exponent - format_of(grad_dtype).digits + 1);
        for (std::int64_t c = 0; c < columns; ++c) {
            const double got =
                decoded(grad_dtype, out.grad[n * static_cast<std::size_t>(columns) + static_cast<std::size_t>(c)]);
            const double expected = truth.value[static_cast<std::size_t>(c)];
            const double tolerance = (3e-6 + tied) * truth.magnitude[static_cast<std::size_t>(c)] +
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
        return out;
    }
    void bind(cpu::DenseCall& a, Outputs& out) const {
        a.soft = teachers.empty() ? nullptr : out.soft.data();
        a.hard = labels.empty() ? nullptr : out.hard.data();
        a.z2 = out.z2.data();
        a.stats = out.stats.data();
        a.dsoft_dtemperature = out.dtau.empty() ? nullptr : out.dtau.data();
    }
};

}  // namespace

TEST(oracle_gradient_is_that_of_its_value) {
    for (const Term& term : every_term)
        for (bool mix : {false, true}) {
            const Scope scope(
                text(cpu::divergence_names[static_cast<std::size_t>(term.kind)], mix ? ", logits mixed" : ""));
            Case c(random, 1, 12, DType::f32, 2);
            c.distilled = 9;
            c.terms = {term};
            c.temperature = 1.7f;
            c.mix_logits = mix;
            c.smoothing = 0.2f;
            const OracleRow o = c.oracle(0);
            const OracleRow::Gradient g = o.gradient();
            for (std::size_t column = 0; column < o.z.size(); ++column) {
                OracleRow up = o, down = o;
                up.z[column] += 1e-5;
                down.z[column] -= 1e-5;
                CHECK_NEAR(g.value[column], (up.loss() - down.loss()) / 2e-5, 1e-8);
            }
        }
}

TEST(conversions_of_the_tests_are_exact) {
    for (DType t : {DType::bf16, DType::f16})
        for (std::uint32_t bits = 0; bits < 65536; ++bits) {
            const double x = decoded(t, bits);
            if (!std::isnan(x)) CHECK_EQUAL(encoded(t, x), bits);
            if (t == DType::bf16 && !std::isnan(x))
                CHECK_EQUAL(x, static_cast<double>(std::bit_cast<float>(bits << 16)));
        }
    CHECK_EQUAL(encoded(DType::f16, 65519.9), 0x7bffu);
    CHECK_EQUAL(encoded(DType::f16, 65520.0), 0x7c00u);
    CHECK_EQUAL(decoded(DType::f16, 0x3555u), 0.333251953125);
    for (int n = 0; n < 1000; ++n) {
        const float x =
            static_cast<float>(std::ldexp(uniform(random, -1, 1), static_cast<int>(integer(random, -150, 120))));
        CHECK_EQUAL(encoded(DType::f32, static_cast<double>(x)), std::bit_cast<std::uint32_t>(x));
    }
}

TEST(every_divergence_and_dtype_matches_fp64) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term)
            for (DType dtype : dtypes)
                for (float temperature : {1.0f, 2.0f, 0.7f}) {
                    const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)], " ",
                                           dtype_names[static_cast<std::size_t>(dtype)]));
                    Case c(random, 3, integer(random, 2, 2500), dtype);
                    c.terms = {term};
                    c.temperature = temperature;
                    c.smoothing = integer(random, 0, 1) ? 0.1f : 0.0f;
                    const Outputs out = c.run(kernels);
                    c.check(out);
                    CHECK(c.run_twice(kernels).same(out));
                    CHECK(c.run_in_place(kernels) == out.grad);
                    c.check(c.run(kernels, true));
                }
    });
}

TEST(terms_mix) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (DType dtype : dtypes) {
            Case c(random, 2, 1100, dtype);
            c.terms = every_term;
            const Outputs out = c.run(kernels);
            c.check(out);
            CHECK(c.run_twice(kernels).same(out));
            c.check(c.run(kernels, true));
        }
    });
}

TEST(truncated_distillation) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t distilled : {1, 15, 1000, 1024, 1025, 8192, 9000})
            for (const Term& term : every_term) {
                const Scope scope(
                    text(distilled, " distilled, ", cpu::divergence_names[static_cast<std::size_t>(term.kind)]));
                Case c(random, 2, 9001, dtypes[integer(random, 0, 2)]);
                c.distilled = distilled;
                c.terms = {term};
                c.temperature = integer(random, 0, 1) ? 2.0f : 1.3f;
                c.smoothing = 0.05f;
                const Outputs out = c.run(kernels);
                c.check(out);
                CHECK(c.run_twice(kernels).same(out));
            }
    });
}

TEST(several_teachers) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term)
            for (bool mix : {false, true})
                for (bool per_row : {false, true}) {
                    const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)],
                                           mix ? ", logits mixed" : ", distributions mixed",
                                           per_row ? ", weights per row" : ""));
                    Case c(random, 3, 1050, dtypes[integer(random, 0, 2)], 3);
                    c.terms = {term};
                    c.mix_logits = mix;
                    c.temperature = 1.5f;
                    // The second teacher weighs nothing and may hold anything.
                    c.weights = {0.3f, 0, 0.7f};
                    if (per_row) c.weights = {0.3f, 0.9f, 0.5f, 0, 0, 0, 0.7f, 0.1f, 0.5f};
                    c.weights_per_row = per_row;
                    c.teachers[1].fill(0);
                    const Outputs out = c.run(kernels);
                    c.check(out);
                    c.teachers[1].fill(not_a_number);
                    CHECK(c.run(kernels).same(out, false));
                    c.threads = 8;
                    CHECK(c.run(kernels).same(out, false));
                    c.check(c.run_twice(kernels));
                }
    });
}

TEST(temperature_gradient_of_several_teachers) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term) {
            const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)]));
            Case c(random, 3, 1050, DType::f32, 3);
            c.terms = {term};
            c.mix_logits = true;
            c.temperature = 1.5f;
            const Outputs out = c.run(kernels, true);
            c.check(out);
            c.threads = 8;
            CHECK(c.run(kernels, true).same(out));
            c.mix_logits = false;  // a mixture of softmaxes has another formula, which is not there
            CHECK_THROWS(ArgumentError, c.run(kernels, true));
        }
    });
}

TEST(no_teacher) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (DType dtype : dtypes) {
            Case c(random, 3, 1500, dtype, 0);
            c.smoothing = 0.1f;
            const Outputs out = c.run(kernels);
            c.check(out);
            CHECK(c.run_twice(kernels).same(out));
        }
    });
}

// Sizes about the widths of vectors, tiles and segments. Few rows for many threads: segments are then what is shared
// out.
TEST(sizes_strides_and_threads_give_the_same_bits) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t columns : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 1023, 1024, 1025, 8191, 8192, 8193, 16400})
            for (DType dtype : dtypes)
                for (Layout layout : {guarded, Layout{1, 0, 9}, Layout{16, 16, 16}, exact}) {
                    const Scope scope(text(columns, " columns, ", dtype_names[static_cast<std::size_t>(dtype)]));
                    Case c(random, 2, columns, dtype, 1, layout);
                    c.terms = {every_term[static_cast<std::size_t>(integer(random, 0, 7))]};
                    c.temperature = columns % 2 ? 1.0f : 1.2f;
                    const Outputs out = c.run(kernels);
                    if (layout.before == 65) c.check(out);
                    for (int threads : {2, 3, 8}) {
                        c.threads = threads;
                        CHECK(c.run(kernels).same(out));
                        CHECK(c.run_in_place(kernels) == out.grad);
                    }
                    CHECK(c.run_twice(kernels).same(out));
                }
    });
}

TEST(many_rows_over_threads_give_the_same_bits) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t columns : {3, 40, 1030}) {
            Case c(random, 301, columns, dtypes[integer(random, 0, 2)]);
            c.terms = {every_term[static_cast<std::size_t>(integer(random, 0, 7))]};
            const Outputs out = c.run(kernels);
            c.check(out);
            for (int threads : {2, 3, 8}) {
                c.threads = threads;
                CHECK(c.run(kernels).same(out));
            }
        }
    });
}

TEST(rows_with_two_leading_axes) {  // such as logits[:, :-1]
    for_each_isa([&](const cpu::Kernels& kernels) {
        Case c(random, 12, 70, DType::bf16);
        cpu::DenseCall flat = c.call(), shifted = c.call();
        for (Rows* rows : {&shifted.student, &shifted.teachers[0]}) {
            rows->shape = {3, 3};
            rows->strides = {4 * 73, 73};
        }
        shifted.rows = 9;
        std::vector<float> all(12, nan32), some(9, nan32);
        flat.labels = shifted.labels = nullptr;
        flat.soft = all.data();
        shifted.soft = some.data();
        kernels.forward(flat);
        kernels.forward(shifted);
        for (std::size_t i = 0; i < 9; ++i) CHECK_EQUAL(some[i], all[i / 3 * 4 + i % 3]);
    });
}

TEST(bad_arguments_throw_before_anything_is_written) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        const auto refused = [&](Case& c) {
            cpu::DenseCall a = c.call();
            std::vector<float> soft(5, 7), hard(5, 7), z2(5, 7),
                stats(static_cast<std::size_t>(5 * a.stats_per_row()), 7);
            Matrix grad(c.grad_dtype, 5, 20, guarded);
            grad.fill(7);
            const std::vector<std::uint32_t> before = grad.all_bits();
            a.soft = soft.data(), a.hard = hard.data(), a.z2 = z2.data(), a.stats = stats.data(), a.grad = grad.rows();
            CHECK_THROWS(ArgumentError, kernels.forward(a));
            for (const std::vector<float>& out : {soft, hard, z2, stats})
                CHECK(std::all_of(out.begin(), out.end(), [](float x) { return x == 7; }));
            CHECK(grad.all_bits() == before);
            CHECK(grad.guards_hold());
        };
        for (int threads : {1, 8}) {
            for (std::int64_t label :
                 {std::int64_t{-1}, std::int64_t{20}, std::int64_t{-100}, INT64_MAX, INT64_MIN + 1}) {
                const Scope scope(text("label ", label));
                Case c(random, 5, 20, DType::f32);
                c.threads = threads;
                c.labels[4] = label;
                refused(c);
            }
            for (float temperature : {0.0f, -1.0f, nan32, -static_cast<float>(infinity)}) {
                const Scope scope(text("temperature ", temperature));
                Case c(random, 5, 20, DType::f32);
                c.threads = threads;
                c.temperature = temperature;
                refused(c);
            }
        }
        // The label of a dropped row is not looked at.
        Case c(random, 2, 20, DType::f32);
        c.labels[1] = -100;
        c.counted = std::make_unique<bool[]>(2);
        c.counted[0] = true;
        c.check(c.run(kernels));
    });
}

TEST(unlabelled_rows) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        Case c(random, 4, 500, DType::f32);
        c.labels[0] = c.labels[3] = cpu::no_label;
        c.smoothing = 0.1f;
        const Outputs out = c.run(kernels);
        CHECK_EQUAL(out.hard[0], 0.0f);
        CHECK_EQUAL(out.hard[3], 0.0f);
        c.check(out);
        CHECK(c.run_twice(kernels).same(out));
    });
}

TEST(dropped_rows_are_zero_whatever_they_hold) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (int threads : {1, 16})
            for (const Term& term : every_term) {
                Case c(random, 5, 9000, dtypes[integer(random, 0, 2)]);
                c.terms = {term};
                c.threads = threads;
                c.counted = std::make_unique<bool[]>(5);
                for (std::int64_t i : {0, 2, 3}) c.counted[i] = true;
                for (std::int64_t i : {1, 4})
                    for (std::int64_t column = 0; column < c.columns; ++column) {
                        c.student.set(i, column, not_a_number);
                        c.teachers[0].set(i, column, not_a_number);
                    }
                const Outputs out = c.run(kernels, true);
                c.check(out);
                for (std::size_t i : {1u, 4u}) {
                    for (const std::vector<float>& v : {out.soft, out.hard, out.z2, out.dtau}) CHECK_EQUAL(v[i], 0.0f);
                    const auto begin = out.grad.begin() + static_cast<std::ptrdiff_t>(i) * c.columns;
                    CHECK(std::all_of(begin, begin + c.columns, [](std::uint32_t bits) { return bits == 0; }));
                }
            }
    });
}

TEST(nan_stays_in_its_row) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term)
            for (bool in_teacher : {false, true})
                for (std::int64_t column : {0, 17, 1500}) {
                    const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)],
                                           in_teacher ? " teacher" : " student"));
                    Case c(random, 3, 1501, DType::f32);
                    c.terms = {term};
                    std::fill(c.c_soft.begin(), c.c_soft.end(), 1.0f);
                    (in_teacher ? c.teachers[0] : c.student).set(1, column, not_a_number);
                    const Outputs out = c.run(kernels);
                    c.check_row(out, 0);
                    c.check_row(out, 2);
                    CHECK(std::isnan(out.soft[1]));
                    if (!in_teacher) CHECK(std::isnan(out.hard[1]));
                    // sign(NaN) = 0, as in autograd
                    const bool silent = in_teacher && term.kind == Divergence::tvd;
                    const double grad = decoded(DType::f32, out.grad[static_cast<std::size_t>(1501 + column)]);
                    CHECK(std::isnan(grad) || silent);
                }
    });
}

TEST(minus_infinity_is_a_column_without_mass) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term)
            for (DType dtype : dtypes) {
                const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)], " ",
                                       dtype_names[static_cast<std::size_t>(dtype)]));
                Case c(random, 3, 2600, dtype);
                c.terms = {term};
                c.smoothing = 0.1f;
                // Row 0: the first tile and a tail are masked on both sides; row 1: only the teacher's; row 2: only the
                // student's.
                for (std::int64_t column = 0; column < c.columns; ++column) {
                    const bool masked = column < 1024 || column >= 2500;
                    if (!masked) continue;
                    for (std::int64_t row : {0, 2}) c.student.set(row, column, -infinity);
                    for (std::int64_t row : {0, 1}) c.teachers[0].set(row, column, -infinity);
                }
                for (std::int64_t& label : c.labels) label = 1100;
                const Outputs out = c.run(kernels);
                // Where a divergence is infinite its gradient is finite, and held to that alone.
                for (std::int64_t row = 0; row < 3; ++row) {
                    if (std::isfinite(c.oracle(row).soft())) {
                        c.check_row(out, row);
                    } else {
                        CHECK_EQUAL(static_cast<double>(out.soft[static_cast<std::size_t>(row)]), infinity);
                    }
                }
                if (term.kind == Divergence::forward_kl)
                    for (std::size_t n = 0; n < out.grad.size(); ++n) CHECK(std::isfinite(decoded(dtype, out.grad[n])));
                CHECK(c.run_twice(kernels).same(out));
            }
    });
}

TEST(large_logits_do_not_overflow) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (DType dtype : dtypes)
            for (double shift : {1e4, -1e4}) {
                Case c(random, 2, 1200, dtype);
                for (std::int64_t i = 0; i < 2; ++i)
                    for (std::int64_t column = 0; column < c.columns; ++column) {
                        c.student.set(i, column, c.student.get(i, column) + shift);
                        c.teachers[0].set(i, column, c.teachers[0].get(i, column) + shift);
                    }
                const Outputs out = c.run(kernels);
                for (std::int64_t i = 0; i < 2; ++i) {
                    const OracleRow o = c.oracle(i);
                    // A logit of 1e4 is itself good to 5e-4 in fp32.
                    const auto n = static_cast<std::size_t>(i);
                    CHECK_NEAR(static_cast<double>(out.soft[n]), o.soft(), 4e-3 * (1 + o.soft()));
                    CHECK_NEAR(static_cast<double>(out.hard[n]), o.hard(), 4e-3 * (1 + o.hard()));
                    CHECK_NEAR(static_cast<double>(out.z2[n]), o.z2(), 1e-6 * o.z2());
                }
                for (std::uint32_t bits : out.grad) CHECK(std::isfinite(decoded(dtype, bits)));
            }
    });
}

TEST(no_divergence_at_the_teacher_itself) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term) {
            const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)]));
            Case c(random, 2, 3000, DType::bf16);
            c.terms = {term};
            c.teachers[0] = Matrix(DType::f32, 2, 3000, guarded);
            for (std::int64_t i = 0; i < 2; ++i)
                for (std::int64_t column = 0; column < 3000; ++column)
                    c.teachers[0].set(i, column, c.student.get(i, column));
            const Outputs out = c.run(kernels);
            for (float soft : out.soft) CHECK_NEAR(static_cast<double>(soft), 0, 1e-7);
        }
    });
}

TEST(small_divergences_keep_their_digits) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term) {
            const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)]));
            Case c(random, 2, 3000, DType::f32);
            c.teachers[0] = Matrix(DType::f32, 2, 3000, guarded);
            c.terms = {term};
            std::normal_distribution<double> normal;
            for (std::int64_t i = 0; i < 2; ++i)
                for (std::int64_t column = 0; column < c.columns; ++column)
                    c.teachers[0].set(i, column, c.student.get(i, column) + 0.01 * normal(random));
            const Outputs out = c.run(kernels);
            for (std::int64_t i = 0; i < 2; ++i) {
                const double truth = c.oracle(i).soft();  // about 1e-5, or 4e-3 for the total variation
                // which is a difference of probabilities, each with its roundings
                const double rounding = term.kind == Divergence::tvd ? 5e-7 : 0;
                CHECK_NEAR(static_cast<double>(out.soft[static_cast<std::size_t>(i)]), truth, 2e-3 * truth + rounding);
            }
        }
    });
}

TEST(passes_one_by_one_agree_with_one_call) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term)
            for (const std::int64_t columns : {7, 1000, 9001}) {
                const Scope scope(
                    text(cpu::divergence_names[static_cast<std::size_t>(term.kind)], ", ", columns, " columns"));
                Case c(random, 3, columns, dtypes[integer(random, 0, 2)]);
                c.terms = {term};
                c.temperature = integer(random, 0, 1) ? 2.0f : 1.3f;
                c.smoothing = 0.1f;
                const Outputs out = c.run(kernels);
                cpu::DenseCall call = c.call();
                const std::int64_t size = call.stats_per_row(), sizes = call.values_per_row;
                std::vector<float> stats(c.rows * size), logit_sum(c.rows), values(c.rows * sizes);
                call.stats = stats.data();
                call.logit_sum = logit_sum.data();
                kernels.sums(call);
                call.logit_sum = nullptr;
                call.values = values.data();
                call.values_with_dtemperature = integer(random, 0, 1) == 1;
                kernels.values(call);
                for (std::int64_t i = 0; i < c.rows; ++i) {
                    double total = 0;
                    for (std::int64_t j = 0; j < columns; ++j) total += c.student.get(i, j);
                    CHECK(std::abs(logit_sum[i] - total) <= 1e-4 * static_cast<double>(columns));
                    for (std::int64_t k = 0; k < size; ++k)  // but for the sum that pass 2 finds
                        if (k != 4) CHECK(stats[i * size + k] == out.stats[i * size + k]);
                    const double soft = out.soft[i], sum_student = out.stats[i * size + 4];
                    CHECK(std::abs(values[i * sizes] - soft) <= 1e-6 + 1e-5 * std::abs(soft));
                    CHECK(std::abs(values[i * sizes + 1] - term.weight * sum_student) <=
                          2e-5 * (1 + std::abs(sum_student)));
                }
            }
    });
}

TEST(no_rows) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (int threads : {1, 4}) {
            Case c(random, 0, 33, DType::f32);
            c.threads = threads;
            CHECK(c.run(kernels).grad.empty());
        }
    });
}

TEST(outputs_not_asked_for_change_nothing) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term) {
            const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)]));
            Case c(random, 2, 2050, DType::f32);
            c.terms = {term};
            const Outputs all = c.run(kernels);
            std::vector<float> soft(2, nan32);
            cpu::DenseCall a = c.call();
            a.labels = nullptr;
            a.c_soft = a.c_hard = a.c_z = nullptr;
            a.soft = soft.data();
            kernels.forward(a);
            for (std::size_t i = 0; i < 2; ++i)
                CHECK_NEAR(static_cast<double>(soft[i]), static_cast<double>(all.soft[i]),
                           1e-6 * std::abs(soft[i]) + 1e-8);
        }
    });
}

TEST(scale_rounds_to_nearest_even) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (DType dtype : {DType::bf16, DType::f16})
            for (float factor : {1.0f, 1.0f / 3, 1000.0f, -0x1p-9f})
                for (int threads : {1, 3}) {
                    const Scope scope(text(dtype_names[static_cast<std::size_t>(dtype)], " times ", factor));
                    constexpr std::int64_t columns = 1927;  // 34 rows hold every pattern of 16 bits
                    Matrix m(dtype, 35, columns, guarded);
                    for (std::uint32_t n = 0; n < 35 * columns; ++n) m.set_bits(n / columns, n % columns, n & 0xffff);
                    kernels.scale(m.rows(), 35, factor, threads);
                    for (std::uint32_t n = 0; n < 35 * columns; ++n) {
                        const float x = static_cast<float>(decoded(dtype, n & 0xffff));
                        const std::uint32_t got = m.bits(n / columns, n % columns);
                        if (std::isnan(x)) {
                            CHECK(std::isnan(decoded(dtype, got)));
                        } else {
                            CHECK_EQUAL(got, encoded(dtype, static_cast<double>(x * factor)));
                        }
                    }
                    CHECK(m.guards_hold());
                }
    });
}

TEST(scale_of_fp32_and_of_exact_memory) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (DType dtype : dtypes)
            for (std::int64_t columns : {1, 5, 17, 1023, 1025, 2999})
                for (Layout layout : {guarded, exact}) {
                    Matrix m(dtype, 3, columns, layout);
                    for (std::int64_t i = 0; i < 3; ++i)
                        for (std::int64_t c = 0; c < columns; ++c) m.set(i, c, uniform(random, -9, 9));
                    const std::vector<std::uint32_t> before = m.all_bits();
                    kernels.scale(m.rows(), 3, 1.7f, 2);
                    const std::vector<std::uint32_t> after = m.all_bits();
                    for (std::size_t n = 0; n < before.size(); ++n) {
                        const float product = static_cast<float>(decoded(dtype, before[n])) * 1.7f;
                        CHECK_EQUAL(after[n], encoded(dtype, static_cast<double>(product)));
                    }
                    CHECK(m.guards_hold());
                }
    });
}

TEST(triad_adds) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t count : {0, 1, 15, 17, 1023, 1025, 65535, 65537, 200001})
            for (int threads : {1, 3})
                for (std::size_t offset : {0u, 1u}) {  // of the output, in floats: streaming stores want alignment
                    const auto n = static_cast<std::size_t>(count);
                    std::vector<float> a(n), b(n), out(n + offset, nan32);
                    for (std::size_t i = 0; i < n; ++i) {
                        a[i] = static_cast<float>(uniform(random, -1, 1));
                        b[i] = static_cast<float>(uniform(random, -1, 1));
                    }
                    kernels.triad(a.data(), b.data(), out.data() + offset, count, threads);
                    for (std::size_t i = 0; i < n; ++i) CHECK_EQUAL(out[i + offset], a[i] + b[i]);
                    if (offset) CHECK(std::isnan(out[0]));
                }
    });
}
