// The kernels of every instruction set against the oracle: every divergence, dtype and mode.
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/error.h"
#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;

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
            // Of what has a kink where p = q so small a step that hardly any lies within it.
            const bool kinks = term.kind == Divergence::tvd;
            const double step = kinks ? 1e-7 : 1e-5;
            for (std::size_t column = 0; column < o.z.size(); ++column) {
                OracleRow up = o, down = o;
                up.z[column] += step;
                down.z[column] -= step;
                CHECK_NEAR(g.value[column], (up.loss() - down.loss()) / (2 * step), kinks ? 1e-6 : 1e-8);
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

TEST(capped_logits_match_fp64) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Term& term : every_term)
            for (DType dtype : dtypes)
                for (const cpu::Cap& cap : {cpu::Cap{1, 3}, cpu::Cap{0.4f, 0}, cpu::Cap{-1.5f, 5}}) {
                    const Scope scope(text(cpu::divergence_names[static_cast<std::size_t>(term.kind)], " ",
                                           dtype_names[static_cast<std::size_t>(dtype)], " ", cap.scale, " ",
                                           cap.softcap));
                    Case c(random, 2, integer(random, 2, 2500), dtype);
                    c.terms = {term};
                    c.temperature = integer(random, 0, 1) ? 1.0f : 1.6f;
                    c.smoothing = integer(random, 0, 1) ? 0.1f : 0.0f;
                    c.student_cap = cap;
                    c.teacher_caps = {cpu::Cap{0.8f, 4}};
                    if (c.columns > 2) c.student.set(1, c.labels[1] == 0 ? 1 : 0, -infinity);
                    if (c.columns > 2) c.teachers[0].set(1, c.labels[1] == 0 ? 1 : 0, -infinity);
                    const Outputs out = c.run(kernels);
                    c.check(out);
                    CHECK(c.run_twice(kernels).same(out));
                    CHECK(c.run_in_place(kernels) == out.grad);
                    c.threads = 8;
                    CHECK(c.run(kernels).same(out));
                }
        for (bool mix : {false, true}) {
            Case c(random, 2, 1100, DType::bf16, 3);
            c.mix_logits = mix;
            c.student_cap = {1, 4};
            c.teacher_caps = {cpu::Cap{2, 5}, cpu::Cap{}, cpu::Cap{0.5f, 0}};
            c.check(c.run(kernels));
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
