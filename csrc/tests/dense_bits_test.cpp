// The dense loss has the same bits whatever the threads, and however its rows lie in memory.
#include <cstdint>
#include <vector>

#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

// A teacher whose logits are the student's, some noise and a shift.
Matrix near(Random& random, const Case& c, DType dtype, double noise, double shift) {
    std::normal_distribution<double> normal;
    Matrix t(dtype, c.rows, c.columns, guarded);
    for (std::int64_t i = 0; i < c.rows; ++i)
        for (std::int64_t column = 0; column < c.columns; ++column)
            t.set(i, column, c.student.get(i, column) + noise * normal(random) + shift);
    return t;
}

}  // namespace

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

// Vectors are streamed to aligned memory only, and a small KL is summed on other ways than a large one.
TEST(a_gradient_has_the_same_bits_at_any_address) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (Divergence kind : {Divergence::forward_kl, Divergence::reverse_kl, Divergence::jsd})
            for (DType dtype : {DType::f32, DType::bf16})
                for (std::int64_t columns : {1001, 2050, 9001})
                    for (double distance : {0.05, 2.0})
                        for (float smoothing : {0.0f, 0.1f}) {
                            const Scope scope(text(columns, " columns, distance ", distance, ", ", smoothing));
                            Case c(random, 2, columns, dtype);
                            c.terms = {{kind, 1, 0.5f}};
                            c.smoothing = smoothing;
                            c.temperature = 2;
                            c.teachers[0] = near(random, c, dtype, distance, 0);
                            const Outputs out = c.run(kernels);
                            c.check(out);
                            for (Layout layout : {Layout{1, 0, 9}, Layout{2, 0, 3}, Layout{16, 16, 16}, exact}) {
                                c.layout = layout;
                                CHECK(c.run(kernels).same(out));
                                CHECK(c.run_twice(kernels).same(out));
                            }
                        }
    });
}

// Pass 1 has the value of a KL that is not small, however far apart the logits of the two lie.
TEST(a_kl_about_an_eighth_of_a_nat) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (Divergence kind : {Divergence::forward_kl, Divergence::reverse_kl})
            for (double shift : {0.0, 300.0, -40.0})
                for (double distance : {0.3, 0.45, 0.5, 0.55, 0.8, 1.5}) {
                    Case c(random, 3, 3000, DType::f32);
                    c.terms = {{kind, 1, 0}};
                    c.teachers[0] = near(random, c, DType::f32, distance, shift);
                    c.check(c.run(kernels));
                    c.check(c.run_twice(kernels));
                }
    });
}
