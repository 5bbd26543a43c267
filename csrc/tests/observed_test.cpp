// What a call observes for metrics: the columns of the largest logits and the entropies, against the oracle.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

double entropy(const Vector& log_p) {
    double sum = 0;
    for (double v : log_p)
        if (std::isfinite(v)) sum -= std::exp(v) * v;
    return sum;
}

double first_largest(const Vector& x) { return static_cast<double>(std::max_element(x.begin(), x.end()) - x.begin()); }

// Equal logits within a vector, over tiles and over segments, and absent columns.
void disturb(Random& random, Matrix& x) {
    for (std::int64_t i = 0; i < x.rows().columns && i < 3; ++i) x.set(0, integer(random, 0, x.rows().columns - 1), 6);
    for (int k = 0; k < 5; ++k) x.set(1, integer(random, 0, x.rows().columns - 1), -infinity);
    x.set(1, x.rows().columns - 1, 30);
}

void check_observed(const Case& c, const Outputs& out, bool exact_columns) {
    for (std::int64_t i = 0; i < c.rows; ++i) {
        const Scope scope(text("row ", i));
        const double* seen = out.observed.data() + i * cpu::DenseCall::observed_per_row;
        const OracleRow o = c.oracle(i);
        const bool taught = !c.teachers.empty();
        const Vector shared = taught ? o.distilled() : o.z;
        const auto column = [&](const Vector& x, double found) {
            if (exact_columns) {
                CHECK(found == first_largest(x));
                return;
            }
            CHECK(found >= 0 && found < static_cast<double>(x.size()));
            CHECK_NEAR(x[static_cast<std::size_t>(found)], *std::max_element(x.begin(), x.end()), 1e-5);
        };
        column(o.z, seen[0]);
        column(shared, seen[1]);
        CHECK_NEAR(seen[2], entropy(log_softmax(shared, taught ? o.temperature : 1)), 2e-5);
        if (!taught) {
            CHECK(seen[3] == cpu::DenseCall::no_top_of_teacher);
            continue;
        }
        const Vector log_q = o.log_teacher();
        column(log_q, seen[3]);
        CHECK_NEAR(seen[4], entropy(log_q), 2e-5);
    }
}

}  // namespace

TEST(metrics_are_those_of_the_oracle_and_have_the_same_bits_over_threads) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t columns : {1, 7, 16, 33, 1024, 1025, 8193, 16400})
            for (DType dtype : dtypes)
                for (std::size_t teachers : {0, 1, 2}) {
                    const Scope scope(text(columns, " columns, ", teachers, " teachers"));
                    Case c(random, 2, columns, dtype, teachers);
                    disturb(random, c.student);
                    for (Matrix& t : c.teachers) disturb(random, t);
                    c.terms = {every_term[static_cast<std::size_t>(integer(random, 0, 2))]};
                    c.temperature = std::array{1.0f, 2.0f, 0.7f}[static_cast<std::size_t>(integer(random, 0, 2))];
                    c.mix_logits = teachers == 2 && columns % 2 == 0;
                    if (columns > 20) c.distilled = columns - integer(random, 0, 9);
                    const Outputs plain = c.run(kernels);
                    c.observes = true;
                    const Outputs out = c.run(kernels);
                    check_observed(c, out, teachers < 2);
                    Outputs others = out;
                    others.observed.clear();
                    CHECK(others.same(plain));
                    for (int threads : {2, 3, 8}) {
                        c.threads = threads;
                        CHECK(c.run(kernels).same(out));
                    }
                }
    });
}

TEST(metrics_of_capped_logits_are_of_the_capped_ones) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        Case c(random, 5, 2100, dtypes[integer(random, 0, 2)]);
        c.student_cap = {0.5f, 3};
        c.teacher_caps = {{-1, 4}};
        c.observes = true;
        check_observed(c, c.run(kernels), false);
    });
}

TEST(rows_without_a_largest_logit_have_no_column) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (DType dtype : {DType::f32, DType::f16}) {
            Case c(random, 4, 1500, dtype);
            c.observes = true;
            c.student.set(0, 700, not_a_number);
            c.teachers[0].set(0, 1400, not_a_number);
            c.student.set(1, 3, infinity);
            c.teachers[0].set(1, 3, infinity);
            for (std::int64_t column = 0; column < c.columns; ++column) {
                c.student.set(2, column, -infinity);
                c.teachers[0].set(2, column, -infinity);
            }
            c.counted = std::make_unique<bool[]>(4);
            std::fill_n(c.counted.get(), 3, true);
            const Outputs out = c.run(kernels);
            for (std::int64_t i = 0; i < 3; ++i) {
                const double* seen = out.observed.data() + i * cpu::DenseCall::observed_per_row;
                CHECK(seen[0] == cpu::DenseCall::no_top);
                CHECK(seen[1] == cpu::DenseCall::no_top);
                CHECK(seen[3] == cpu::DenseCall::no_top_of_teacher);
                CHECK(std::isnan(seen[2]) && std::isnan(seen[4]));
            }
            for (int k = 0; k < 5; ++k) CHECK(out.observed[static_cast<std::size_t>(15 + k)] == 0);
        }
    });
}
