// The loss of sparse targets, by every instruction set, against its definition in fp64.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;
using cpu::TailRule;

namespace {

// Every divergence under every rule that defines it.
struct Rule {
    TailRule tail;
    std::vector<Term> terms;
};
const std::vector<Rule> rules = {
    {TailRule::bucket, {{Divergence::forward_kl, 1, 0}}},
    {TailRule::bucket, {{Divergence::reverse_kl, 0.8f, 0}}},
    {TailRule::bucket, {{Divergence::jsd, 1, 0.3f}}},
    {TailRule::bucket,
     {{Divergence::forward_kl, 0.5f, 0}, {Divergence::jsd, 2, 0.5f}, {Divergence::reverse_kl, 0.25f, 0}}},
    {TailRule::renorm, {{Divergence::forward_kl, 1.5f, 0}}},
    {TailRule::renorm, {{Divergence::jsd, 1, 0.6f}}},
    {TailRule::zero, {{Divergence::forward_kl, 1.2f, 0}}},
    {TailRule::drawn, {{Divergence::forward_kl, 1, 0}}},
};

std::string name(const Rule& rule) {
    std::string out(cpu::tail_rule_names[static_cast<std::size_t>(rule.tail)]);
    for (const Term& t : rule.terms) out += " " + std::string(cpu::divergence_names[static_cast<std::size_t>(t.kind)]);
    return out;
}

// Targets of a teacher over `columns` columns: `kept` of them a row, in no order.
Targets draw_targets(Random& random, const Case& c, TailRule rule, std::int64_t kept, std::int64_t columns) {
    Targets t{rule, kept, columns, {}, {}, {}};
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < c.rows; ++i) {
        Vector logits;
        for (std::int64_t column = 0; column < columns; ++column) logits.push_back(normal(random));
        const Vector lq = log_softmax(logits, 1);
        std::vector<std::int32_t> ids(static_cast<std::size_t>(columns));
        std::iota(ids.begin(), ids.end(), 0);
        std::shuffle(ids.begin(), ids.end(), random);
        double scaled = 0, entropy = 0;
        for (double v : lq) scaled += std::exp(v / static_cast<double>(c.temperature));
        for (std::int64_t k = 0; k < kept; ++k) {
            const std::int32_t id = ids[static_cast<std::size_t>(k)];
            const double v = lq[static_cast<std::size_t>(id)], mass = uniform(random, 0, 2) / static_cast<double>(kept);
            t.ids.push_back(id);
            t.values.push_back(static_cast<float>(rule == TailRule::drawn ? mass : v));
            entropy += mass * v;
        }
        if (rule != TailRule::renorm)
            t.per_row.push_back(static_cast<float>(rule == TailRule::drawn ? entropy : std::log(scaled)));
    }
    return t;
}

Case draw_case(Random& random, const Rule& rule, std::int64_t rows, std::int64_t columns, std::int64_t kept,
               DType dtype, float temperature = 1, Layout layout = guarded) {
    Case c(random, rows, columns, dtype, 0, layout);
    c.temperature = temperature;
    c.terms = rule.terms;
    c.targets = draw_targets(random, c, rule.tail, kept, columns);
    return c;
}

// A row's distillation term by its definition: the kept columns, and under two of the rules the tail, as outcomes.
struct Truth {
    double soft = 0;
    double soft_slack = 0;
    Vector gradient;   // dD/dz of every column
    Vector magnitude;  // what rounding errors of the gradient are relative to
};

Truth truth_of(const Case& c, std::int64_t i) {
    const Targets& t = *c.targets;
    const double tau = static_cast<double>(c.temperature), per_row = t.per_row.empty() ? 0 : t.per_row[i];
    const Vector lp = log_softmax(c.student.row(i, c.distilled), tau);
    const bool tailed = t.rule == TailRule::bucket || t.rule == TailRule::renorm;
    std::vector<std::size_t> columns;
    Vector lq, weight;
    for (std::int64_t k = 0; k < t.kept; ++k) {
        const std::int32_t id = t.ids[static_cast<std::size_t>(i * t.kept + k)];
        if (id < 0 || id >= c.distilled) continue;
        const double value = t.values[static_cast<std::size_t>(i * t.kept + k)];
        columns.push_back(static_cast<std::size_t>(id));
        weight.push_back(value);
        lq.push_back(value / tau - (t.rule == TailRule::drawn ? 0 : per_row));
    }
    if (t.rule == TailRule::renorm) {
        const double lse = logsumexp(lq);
        for (double& v : lq) v -= lse;
    }
    Vector beside = lp;
    for (std::size_t column : columns) beside[column] = -infinity;
    const double lp_tail = logsumexp(beside);
    double total_weight = 0, q_sum = 0;
    for (const Term& term : c.terms) total_weight += static_cast<double>(term.weight);
    for (double v : lq) q_sum += std::exp(v);
    const bool complete = columns.size() == lp.size();
    const double q_tail = !tailed || t.rule == TailRule::renorm || complete ? 0 : 1 - q_sum;

    Truth out{0, 0, Vector(lp.size()), Vector(lp.size())};
    Vector student;
    double sum = 0, size = 0, of_tail = 0, tail_size = 0;
    for (std::size_t k = 0; k < columns.size(); ++k) {
        double s = 0;
        if (tailed) {
            for (const Term& term : c.terms) {
                const Summand part = summand(term, lq[k], lp[columns[k]]);
                out.soft += static_cast<double>(term.weight) * part.value;
                s += static_cast<double>(term.weight) * part.student;
            }
        } else {
            const double w = t.rule == TailRule::drawn ? weight[k] : std::exp(lq[k]);
            const double log_ratio = t.rule == TailRule::drawn ? -lp[columns[k]] : lq[k] - lp[columns[k]];
            out.soft += w == 0 ? 0 : total_weight * w * log_ratio;
            s = -total_weight * w;
        }
        student.push_back(s);
        sum += s;
        size += std::abs(s);
    }
    if (t.rule == TailRule::drawn) out.soft += total_weight * per_row;
    if (tailed && !complete)
        for (const Term& term : c.terms) {
            const Summand part = summand(term, std::log(q_tail), lp_tail);
            out.soft += static_cast<double>(term.weight) * part.value;
            of_tail += static_cast<double>(term.weight) * part.student;
            tail_size += static_cast<double>(term.weight) * (std::abs(part.student) + std::exp(lp_tail));
        }
    sum += of_tail;
    size += tail_size;
    // 1 - sum p, of fp32 terms; where it is summed anew, its logarithm is rounded. And so 1 - sum q.
    const double p_tail = std::exp(lp_tail), lost = complete ? 0 : p_tail < 0.9e-3 ? -0.03 * lp_tail : 0.3 / p_tail;
    const double lost_q = q_tail > 0 ? 0.2 * total_weight * (1 + p_tail / q_tail) : 0;
    out.soft_slack = q_tail > 0 ? 4e-6 * total_weight * q_tail * lost : 0;
    // A p below 2^-126 is 0: over 4e-6, times what multiplies it.
    const double flushed = 3e-33 * (20 + size + (complete ? 0 : std::abs(of_tail) / p_tail));
    for (std::size_t column = 0; column < lp.size(); ++column) {
        const double share = beside[column] == -infinity ? 0 : std::exp(beside[column] - lp_tail);
        const double p = std::exp(lp[column]);
        out.gradient[column] = (share * of_tail - p * sum) / tau;
        out.magnitude[column] =
            (share * (tail_size * (1 + lost) + lost_q) + flushed + p * (size + total_weight + lost_q)) / tau;
    }
    for (std::size_t k = 0; k < columns.size(); ++k) {
        out.gradient[columns[k]] += student[k] / tau;
        out.magnitude[columns[k]] += (std::abs(student[k]) + total_weight * std::exp(lp[columns[k]])) / tau;
    }
    return out;
}

void check_row(const Case& c, const Outputs& out, std::int64_t i) {
    const Scope scope(text("row ", i, " of ", c.columns, " columns, ", c.targets->kept, " kept, tau ", c.temperature));
    const auto n = static_cast<std::size_t>(i);
    const Truth truth = truth_of(c, i);
    OracleRow rest = c.oracle(i);  // its cross-entropy and z-loss: there are no teachers in it
    rest.c_soft = 0;
    CHECK_NEAR(static_cast<double>(out.soft[n]), truth.soft, 5e-6 * std::abs(truth.soft) + 5e-6 + truth.soft_slack);
    if (!c.labels.empty()) CHECK_NEAR(static_cast<double>(out.hard[n]), rest.hard(), 4e-6 * rest.hard() + 3e-6);
    CHECK_NEAR(static_cast<double>(out.z2[n]), rest.z2(), 4e-6 * rest.z2() + 3e-6);
    const OracleRow::Gradient others = rest.gradient();
    const double half_unit = std::ldexp(0.5, 1 - format_of(c.grad_dtype).digits);
    const Format format = format_of(c.grad_dtype);
    const double smallest = std::ldexp(1.0, format.min_exponent - format.digits + 1);
    const double factor = static_cast<double>(c.c_soft[n]);
    for (std::size_t column = 0; column < static_cast<std::size_t>(c.columns); ++column) {
        const bool distilled = column < truth.gradient.size();
        const double expected = others.value[column] + (distilled ? factor * truth.gradient[column] : 0);
        const double magnitude =
            others.magnitude[column] + (distilled ? std::abs(factor) * truth.magnitude[column] : 0);
        const double got = decoded(c.grad_dtype, out.grad[n * static_cast<std::size_t>(c.columns) + column]);
        // The further log p is from 0, the fewer of its digits lie behind the point.
        const double distance = std::max(1.0, -std::log2(std::abs(expected) + 1e-38) / 32);
        check_near(__FILE__, __LINE__, text("gradient of column ", column).c_str(), got, expected,
                   4e-6 * distance * magnitude + 1.01 * half_unit * std::abs(expected) + smallest + 1.2e-38);
    }
}

void check(const Case& c, const Outputs& out) {
    for (std::int64_t i = 0; i < c.rows; ++i)
        if (!c.counted || c.counted[i]) check_row(c, out, i);
}

}  // namespace

TEST(sparse_truth_has_the_gradient_of_its_value) {
    for (const Rule& rule : rules) {
        const Scope scope(name(rule));
        Case c = draw_case(random, rule, 1, 12, 5, DType::f32, 1.7f);
        c.distilled = 9;
        c.targets->columns = 12;
        const Truth truth = truth_of(c, 0);
        for (std::int64_t column = 0; column < 9; ++column) {
            const double z = c.student.get(0, column), step = std::ldexp(1.0, -12);
            c.student.set(0, column, z + step);
            const double above = truth_of(c, 0).soft, up = c.student.get(0, column);
            c.student.set(0, column, z - step);
            const double slope = (above - truth_of(c, 0).soft) / (up - c.student.get(0, column));
            c.student.set(0, column, z);
            CHECK_NEAR(truth.gradient[static_cast<std::size_t>(column)], slope, 1e-6);
        }
    }
}

TEST(every_rule_and_dtype_matches_fp64) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (DType dtype : dtypes)
                for (float temperature : {1.0f, 2.0f, 0.7f}) {
                    const Scope scope(name(rule) + " " + dtype_names[static_cast<std::size_t>(dtype)]);
                    const std::int64_t columns = integer(random, 4, 2500), kept = integer(random, 1, columns / 2);
                    Case c = draw_case(random, rule, 3, columns, std::min<std::int64_t>(kept, 90), dtype, temperature);
                    c.smoothing = integer(random, 0, 1) ? 0.1f : 0.0f;
                    c.labels[0] = c.targets->ids[0];
                    c.labels[1] = integer(random, 0, 1) ? cpu::no_label : c.labels[1];
                    const Outputs out = c.run(kernels);
                    check(c, out);
                    CHECK(c.run_twice(kernels).same(out));
                    CHECK(c.run_in_place(kernels) == out.grad);
                }
    });
}

TEST(sparse_targets_alone) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules) {
            const Scope scope(name(rule));
            Case c = draw_case(random, rule, 2, 1500, 33, dtypes[integer(random, 0, 2)]);
            c.labels.clear();
            std::fill(c.c_z.begin(), c.c_z.end(), 0.0f);
            check(c, c.run(kernels));
        }
    });
}

TEST(entries_that_are_not_used) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (std::int64_t columns : {40, 1300}) {
                const Scope scope(name(rule));
                Case c = draw_case(random, rule, 3, columns, 19, DType::f32, 2);
                Targets& t = *c.targets;
                for (std::size_t k : {std::size_t{3}, std::size_t{18}, t.ids.size() - 1}) {
                    t.ids[k] = -1;
                    t.values[k] = nan32;  // never looked at
                }
                check(c, c.run(kernels));
                if (rule.tail == TailRule::renorm) continue;  // of nothing there is no scaling to 1
                std::fill_n(t.ids.begin(), 19, -1);
                check(c, c.run(kernels));
            }
    });
}

TEST(no_entry_at_all) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules) {
            if (rule.tail == TailRule::renorm) continue;
            const Scope scope(name(rule));
            Case c = draw_case(random, rule, 2, 300, 0, DType::f32);
            const Outputs out = c.run(kernels);
            for (float soft : out.soft) CHECK_NEAR(static_cast<double>(soft), 0, 1e-6);
            check(c, out);
        }
    });
}

TEST(every_column_kept) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (std::int64_t columns : {1, 2, 16, 90, 1100}) {
                const Scope scope(name(rule));
                Case c = draw_case(random, rule, 2, columns, columns, DType::f32, 1.3f);
                const Outputs out = c.run(kernels);
                check(c, out);
                CHECK(c.run_in_place(kernels) == out.grad);
            }
    });
}

// Ids beyond the distilled columns are of a wider teacher, and belong to the tail.
TEST(truncated_targets) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (std::int64_t distilled : {30, 1024, 1100}) {
                const Scope scope(name(rule) + text(", ", distilled, " distilled"));
                Case c(random, 2, 1200, dtypes[integer(random, 0, 2)], 0);
                c.terms = rule.terms;
                c.distilled = distilled;
                c.targets = draw_targets(random, c, rule.tail, 25, distilled + 40);
                for (std::size_t k : {1u, 26u}) c.targets->ids[k] = static_cast<std::int32_t>(distilled + 39);
                for (std::size_t n = 0; n < c.targets->ids.size(); ++n)  // and nowhere else
                    if (n % 25 != 1 && c.targets->ids[n] == distilled + 39) c.targets->ids[n] = -1;
                const Outputs out = c.run(kernels);
                check(c, out);
                CHECK(c.run_twice(kernels).same(out));
            }
    });
}

// What the kept columns leave of 1 has no digits then, and is summed from the other columns.
TEST(a_student_that_is_sure) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (double height : {6.0, 12.0, 30.0, 60.0}) {
                const Scope scope(name(rule) + text(", sure by ", height));
                Case c = draw_case(random, rule, 2, 9001, 37, DType::f32);
                for (std::size_t n = 0; n < c.targets->ids.size(); ++n) {
                    const auto row = static_cast<std::int64_t>(n) / 37;
                    c.student.set(row, c.targets->ids[n], c.student.get(row, c.targets->ids[n]) + height);
                }
                const Outputs out = c.run(kernels);
                check(c, out);
                c.threads = 5;
                CHECK(c.run(kernels).same(out));
            }
    });
}

TEST(a_teacher_that_is_sure) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules) {
            if (rule.tail != TailRule::bucket) continue;
            for (double tail : {1e-3, 1e-5, 1e-7, 1e-9}) {
                const Scope scope(name(rule) + text(", tail ", tail));
                Case c = draw_case(random, rule, 2, 5003, 37, DType::f32);
                c.targets->per_row.clear();
                for (std::int64_t i = 0; i < 2; ++i) {  // its largest entry anywhere, 20 tails in the others
                    const auto largest = static_cast<std::int64_t>(random() % 37);
                    double others = 0;
                    for (std::int64_t k = 0; k < 37; ++k) {
                        const double q = k == largest ? 0 : 20 * tail / 36 * uniform(random, 0.5, 1.5);
                        others += q;
                        c.targets->values[static_cast<std::size_t>(37 * i + k)] = static_cast<float>(std::log(q));
                    }
                    const auto at = static_cast<std::size_t>(37 * i + largest);
                    c.targets->values[at] = static_cast<float>(std::log1p(-others - tail));
                    c.student.set(i, c.targets->ids[at], 9);
                }
                check(c, c.run(kernels));
            }
        }
    });
}

TEST(minus_infinity_among_kept_columns_and_others) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (DType dtype : dtypes) {
                const Scope scope(name(rule));
                Case c = draw_case(random, rule, 3, 2600, 21, dtype);
                c.smoothing = 0.1f;
                const auto is_kept = [&](std::int64_t i, std::int64_t column) {
                    const auto* ids = c.targets->ids.data() + i * 21;
                    return std::find(ids, ids + 21, column) != ids + 21;
                };
                for (std::int64_t i = 0; i < 3; ++i)
                    for (std::int64_t column = 0; column < 1100; ++column)
                        if (!is_kept(i, column)) c.student.set(i, column, -infinity);
                c.student.set(1, c.targets->ids[21 + 4], -infinity);  // where the teacher has mass
                for (std::int64_t i = 0; i < 3; ++i) {
                    c.labels[static_cast<std::size_t>(i)] = 2599;
                    c.student.set(i, 2599, 0.5);
                }
                const Outputs out = c.run(kernels);
                for (std::int64_t i : {0, 2}) check_row(c, out, i);
                if (std::isfinite(truth_of(c, 1).soft)) {
                    check_row(c, out, 1);
                } else {
                    CHECK_EQUAL(static_cast<double>(out.soft[1]), infinity);
                }
                const bool finite =
                    rule.terms.size() == 1 && rule.terms[0].kind == Divergence::forward_kl;  // where the value is not
                for (std::int64_t n = 2600; finite && n < 5200; ++n)
                    CHECK(std::isfinite(decoded(dtype, out.grad[static_cast<std::size_t>(n)])));
                CHECK(c.run_twice(kernels).same(out));
            }
    });
}

TEST(nan_stays_in_its_row_of_sparse_targets) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (const Rule& rule : rules)
            for (bool kept : {false, true}) {
                const Scope scope(name(rule) + (kept ? ", kept" : ", another column"));
                Case c = draw_case(random, rule, 3, 1501, 25, DType::f32);
                std::fill(c.c_soft.begin(), c.c_soft.end(), 1.0f);
                std::int64_t column = c.targets->ids[25];
                while (!kept && std::find(c.targets->ids.begin() + 25, c.targets->ids.begin() + 50, column) !=
                                    c.targets->ids.begin() + 50)
                    column = integer(random, 0, 1500);
                c.student.set(1, column, not_a_number);
                const Outputs out = c.run(kernels);
                check_row(c, out, 0);
                check_row(c, out, 2);
                for (const std::vector<float>& v : {out.soft, out.hard, out.z2}) CHECK(std::isnan(v[1]));
                for (std::size_t n = 1501; n < 3002; ++n) CHECK(std::isnan(decoded(DType::f32, out.grad[n])));
            }
    });
}

TEST(dropped_rows_of_sparse_targets) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (int threads : {1, 16})
            for (const Rule& rule : rules) {
                const Scope scope(name(rule));
                Case c = draw_case(random, rule, 4, 9000, 31, dtypes[integer(random, 0, 2)]);
                c.threads = threads;
                c.counted = std::make_unique<bool[]>(4);
                c.counted[0] = c.counted[2] = true;
                for (std::int64_t column = 0; column < c.columns; ++column) c.student.set(1, column, not_a_number);
                std::fill_n(c.targets->ids.begin() + 31, 31, 9000);  // nobody reads them
                std::fill_n(c.targets->ids.begin() + 93, 31, 5);
                const Outputs out = c.run(kernels);
                check(c, out);
                for (std::size_t i : {1u, 3u}) {
                    for (const std::vector<float>& v : {out.soft, out.hard, out.z2}) CHECK_EQUAL(v[i], 0.0f);
                    const auto begin = out.grad.begin() + static_cast<std::ptrdiff_t>(i) * c.columns;
                    CHECK(std::all_of(begin, begin + c.columns, [](std::uint32_t bits) { return bits == 0; }));
                }
            }
    });
}

TEST(bad_ids_throw_before_anything_is_written) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (int threads : {1, 8})
            for (std::int32_t id : {-2, INT32_MIN, 20, INT32_MAX, 7}) {
                const Scope scope(text("id ", id, ", ", threads, " threads"));
                Case c = draw_case(random, rules[0], 5, 20, 6, DType::f32);
                c.threads = threads;
                std::vector<std::int32_t>& ids = c.targets->ids;
                ids[28] = id;
                ids[29] = id == 7 ? 7 : ids[29];  // twice in the last token
                cpu::DenseCall a = c.call();
                std::vector<float> soft(5, 7), stats(static_cast<std::size_t>(5 * a.stats_per_row()), 7);
                Matrix grad(DType::f32, 5, 20, guarded);
                grad.fill(7);
                const std::vector<std::uint32_t> before = grad.all_bits();
                a.soft = soft.data(), a.stats = stats.data(), a.grad = grad.rows();
                CHECK_THROWS(ArgumentError, kernels.forward(a));
                CHECK_THROWS(ArgumentError, kernels.backward(a));
                for (const std::vector<float>& out : {soft, stats})
                    CHECK(std::all_of(out.begin(), out.end(), [](float x) { return x == 7; }));
                CHECK(grad.all_bits() == before);
                CHECK(grad.guards_hold());
            }
        Case c = draw_case(random, rules[0], 2, 20, 6, DType::f32);
        c.targets->ids[1] = c.targets->ids[2] = c.targets->ids[3] = -1;  // no entry stands as often as it likes
        c.targets->ids[6 + 2] = c.targets->ids[5];                       // and tokens share columns
        for (std::size_t k = 0; k < 6; ++k)
            if (k != 2 && c.targets->ids[6 + k] == c.targets->ids[6 + 2]) c.targets->ids[6 + k] = -1;
        check(c, c.run(kernels));
    });
}

TEST(sparse_targets_give_the_same_bits_for_any_threads) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t columns : {1, 9, 17, 1023, 1025, 8193, 16400})
            for (DType dtype : dtypes)
                for (Layout layout : {guarded, exact}) {
                    const Rule& rule = rules[static_cast<std::size_t>(integer(random, 0, 7))];
                    const Scope scope(name(rule) + text(", ", columns, " columns"));
                    const std::int64_t kept = std::max<std::int64_t>(1, std::min<std::int64_t>(50, columns / 2));
                    Case c = draw_case(random, rule, 2, columns, kept, dtype, columns % 2 ? 1.0f : 1.2f, layout);
                    const Outputs out = c.run(kernels);
                    check(c, out);
                    for (int threads : {2, 3, 8}) {
                        c.threads = threads;
                        CHECK(c.run(kernels).same(out));
                        CHECK(c.run_in_place(kernels) == out.grad);
                    }
                    CHECK(c.run_twice(kernels).same(out));
                }
        Case c = draw_case(random, rules[3], 301, 40, 7, DType::bf16);
        const Outputs out = c.run(kernels);
        for (int threads : {2, 8}) {
            c.threads = threads;
            CHECK(c.run(kernels).same(out));
        }
    });
}
