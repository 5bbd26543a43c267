// The dense loss where values are not finite, large, close to each other, missing or wrong.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "core/error.h"
#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;

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

TEST(no_rows) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (int threads : {1, 4}) {
            Case c(random, 0, 33, DType::f32);
            c.threads = threads;
            CHECK(c.run(kernels).grad.empty());
        }
    });
}

// A masked column as -1e4 for one and as -inf, or as the lowest number, for the other.
TEST(a_student_that_underflows_where_the_teacher_has_nothing) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (Divergence kind : {Divergence::forward_kl, Divergence::reverse_kl})
            for (double lowest : {-infinity, -3e38})
                for (DType dtype : {DType::f32, DType::bf16}) {
                    Case c(random, 2, 1500, dtype);
                    c.terms = {{kind, 1, 0}};
                    c.teachers[0] = Matrix(dtype, 2, 1500, guarded);
                    for (std::int64_t i = 0; i < 2; ++i)
                        for (std::int64_t column = 0; column < c.columns; ++column) {
                            const bool masked = column >= 1400;
                            if (masked) c.student.set(i, column, -1e4);
                            c.teachers[0].set(i, column, masked ? lowest : 2 * c.student.get(i, column) + 1);
                        }
                    const Outputs out = c.run(kernels);
                    for (std::uint32_t bits : out.grad) CHECK(std::isfinite(decoded(dtype, bits)));
                    for (float soft : out.soft) CHECK(std::isfinite(soft));
                    CHECK(c.run_twice(kernels).same(out));
                }
    });
}

// Exponents are relative to a maximum that the first columns had; those of a peak that comes late are not large.
TEST(a_peak_late_in_the_row) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t peak : {0, 130, 700, 2000})
            for (double height : {15.0, 30.0, 60.0, 300.0}) {
                const Scope scope(text("peak at ", peak, ", ", height, " high"));
                Case c(random, 1, 2100, DType::f32);
                c.teachers[0] = Matrix(DType::f32, 1, 2100, guarded);
                for (std::int64_t column = 0; column < c.columns; ++column)
                    c.teachers[0].set(0, column, c.student.get(0, column));
                c.student.set(0, peak, c.student.get(0, peak) + height);
                c.teachers[0].set(0, peak, c.teachers[0].get(0, peak) + height);
                c.labels = {peak};
                c.c_soft = {1};
                c.c_hard = {1};
                c.c_z = {0};
                const Outputs out = c.run(kernels);
                const OracleRow o = c.oracle(0);
                CHECK_NEAR(static_cast<double>(out.hard[0]), o.hard(), 4e-7 + 2e-3 * o.hard());
                CHECK_NEAR(static_cast<double>(out.soft[0]), 0, 1e-9);
                const OracleRow::Gradient truth = o.gradient();
                // The peak's own is p - 1, and p = exp(z - lse) has the rounding of a difference of that height.
                for (std::size_t n = 0; n < out.grad.size(); ++n)
                    CHECK_NEAR(decoded(DType::f32, out.grad[n]), truth.value[n],
                               (static_cast<std::int64_t>(n) == peak ? 3e-6 : 4e-7) + 2e-3 * std::abs(truth.value[n]));
            }
    });
}

// A shift of all logits changes nothing that fp32 can hold: the normaliser's own rounding is made good.
TEST(a_shift_of_all_logits) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (double shift : {1024.0, -16384.0, 32768.0})
            for (std::int64_t columns : {1, 2, 1000}) {
                const Scope scope(text("shift ", shift, ", ", columns, " columns"));
                Case c(random, 2, columns, DType::f32);
                c.teachers[0] = Matrix(DType::f32, 2, columns, guarded);
                for (std::int64_t i = 0; i < 2; ++i)
                    for (std::int64_t column = 0; column < columns; ++column) {
                        c.student.set(i, column, shift + static_cast<double>(integer(random, -512, 512)) / 256);
                        c.teachers[0].set(i, column, static_cast<double>(integer(random, -512, 512)) / 256);
                    }
                c.c_z = {0, 0};
                const Outputs out = c.run(kernels);
                for (std::int64_t i = 0; i < 2; ++i) {
                    const OracleRow::Gradient truth = c.oracle(i).gradient();
                    for (std::int64_t column = 0; column < columns; ++column) {
                        const auto n = static_cast<std::size_t>(i * columns + column);
                        CHECK_NEAR(decoded(DType::f32, out.grad[n]), truth.value[static_cast<std::size_t>(column)],
                                   2e-6);
                    }
                }
            }
    });
}

// A call without cross-entropy and z-loss has no softmax at temperature 1, whose normaliser is then that of another
// temperature: what follows from it may be infinite, and must not be looked at.
TEST(a_shift_at_a_temperature_without_labels) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (float temperature : {0.0625f, 0.25f, 2.0f, 4.0f, 50.0f})
            for (double shift : {30.0, -200.0, 8192.0, -8192.0})
                for (std::int64_t beyond : {0, 40}) {
                    const Scope scope(text("temperature ", temperature, ", shift ", shift, ", ", beyond, " beyond"));
                    for (Divergence kind : {Divergence::forward_kl, Divergence::reverse_kl, Divergence::jsd}) {
                        Case c(random, 2, 1300, DType::f32);
                        c.terms = {{kind, 1, 0.5f}};
                        c.teachers[0] = Matrix(DType::f32, 2, 1300, guarded);
                        c.distilled = c.columns - beyond;
                        c.temperature = temperature;
                        c.labels.clear();
                        c.c_z = {0, 0};
                        for (std::int64_t i = 0; i < 2; ++i)
                            for (std::int64_t column = 0; column < c.columns; ++column) {
                                const double far = column < c.distilled ? 0 : 20;
                                c.student.set(i, column,
                                              shift + far + static_cast<double>(integer(random, -512, 512)) / 256);
                                c.teachers[0].set(i, column, static_cast<double>(integer(random, -512, 512)) / 256);
                            }
                        cpu::DenseCall a = c.call();
                        std::vector<float> soft(2, nan32), stats(static_cast<std::size_t>(2 * a.stats_per_row()));
                        Matrix grad(DType::f32, 2, c.columns, guarded), later(DType::f32, 2, c.columns, guarded);
                        for (Matrix* g : {&grad, &later}) g->fill(not_a_number);
                        a.c_z = nullptr;
                        a.soft = soft.data(), a.stats = stats.data(), a.grad = grad.rows();
                        kernels.forward(a);
                        a.soft = nullptr, a.grad = later.rows();
                        kernels.backward(a);
                        CHECK(grad.all_bits() == later.all_bits());
                        for (std::int64_t i = 0; i < 2; ++i) {
                            const OracleRow o = c.oracle(i);
                            const auto n = static_cast<std::size_t>(i);
                            CHECK_NEAR(static_cast<double>(soft[n]), o.soft(), 3e-5 * o.soft() + 1e-6);
                            const OracleRow::Gradient truth = o.gradient();
                            for (std::int64_t column = 0; column < c.columns; ++column) {
                                const auto k = static_cast<std::size_t>(column);
                                CHECK_NEAR(grad.get(i, column), truth.value[k], 3e-5 * truth.magnitude[k] + 1e-7);
                            }
                        }
                    }
                }
    });
}

// The cross-entropy of a token that is all but sure is what its sum has beside the label's own exponential.
TEST(no_cross_entropy_is_below_0) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t columns : {2, 33, 1500, 20000})
            for (float temperature : {1.0f, 2.0f, 3.0f})
                for (double height : {1.0, 6.0, 15.0, 40.0}) {
                    const Scope scope(text(columns, " columns, temperature ", temperature, ", ", height, " high"));
                    Case c(random, 4, columns, DType::f32);
                    c.temperature = temperature;
                    for (std::int64_t i = 0; i < 4; ++i) {
                        double top = -infinity;
                        for (std::int64_t column = 0; column < columns; ++column)
                            top = std::max(top, c.student.get(i, column));
                        c.student.set(i, c.labels[static_cast<std::size_t>(i)], top + height);
                    }
                    const Outputs out = c.run(kernels);
                    for (std::int64_t i = 0; i < 4; ++i) {
                        const double truth = c.oracle(i).hard(), got = out.hard[static_cast<std::size_t>(i)];
                        CHECK(got >= 0);
                        // What a tile's sum loses: 1,024 columns in 16 lanes, half of 1's last digit each in the
                        // label's.
                        CHECK_NEAR(got, truth, 2e-6 * truth + 4e-6);
                    }
                }
    });
}
