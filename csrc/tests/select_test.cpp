// Selection of sparse targets, by every instruction set, against a sort of the row and sums in fp64.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/philox.h"
#include "harness.h"
#include "matrix.h"

using namespace kdfast;
using namespace kdfast::test;
using cpu::Method;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr float nan32 = std::numeric_limits<float>::quiet_NaN();
constexpr std::array dtypes = {DType::f32, DType::bf16, DType::f16};

template <class Body>
void for_each_isa(Body body) {
    for (const cpu::Isa& isa : cpu::isa_table()) {
        if (!isa.supported()) continue;
        const Scope scope{std::string(isa.name)};
        body(*isa.kernels->select);
    }
}

Matrix normal(Random& random, DType dtype, std::int64_t rows, std::int64_t columns, Layout layout) {
    Matrix x(dtype, rows, columns, layout);
    std::normal_distribution<double> draw(0, 3);
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t c = 0; c < columns; ++c) x.set(i, c, draw(random));
    return x;
}

struct Outputs {
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> logprobs, lse, mass, neg_entropy;

    bool same(const Outputs& o) const {  // bits, so that NaN equals NaN
        const auto equal = [](const auto& a, const auto& b) {
            return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
        };
        return equal(ids, o.ids) && equal(k_eff, o.k_eff) && equal(logprobs, o.logprobs) && equal(lse, o.lse) &&
               equal(mass, o.mass) && equal(neg_entropy, o.neg_entropy);
    }
};

struct Case {
    Matrix logits;
    std::int64_t rows;
    Method method = Method::topk;
    std::int64_t k = 64, least = 1;
    double p = 0.9;
    std::vector<double> temperatures = {1};
    std::uint64_t seed = 7;
    int threads = 1;

    Outputs run(const cpu::SelectKernels& kernels) const {
        const auto n = static_cast<std::size_t>(rows), nk = n * static_cast<std::size_t>(k);
        Outputs o;
        o.ids.assign(nk, -7);
        o.k_eff.assign(n, -7);
        o.logprobs.assign(nk, nan32);
        o.lse.assign(n * temperatures.size(), nan32);
        o.mass.assign(nk, nan32);
        o.neg_entropy.assign(n, nan32);
        cpu::SelectCall call;
        call.rows = rows;
        call.logits = logits.rows();
        call.method = method;
        call.k = k;
        call.least = least;
        call.p = p;
        call.temperatures = temperatures;
        call.seed = seed;
        call.ids = o.ids.data();
        call.logprobs = o.logprobs.data();
        call.lse = o.lse.data();
        call.k_eff = o.k_eff.data();
        call.mass = o.mass.data();
        call.neg_entropy = o.neg_entropy.data();
        call.threads = threads;
        cpu::select(call, kernels);
        return o;
    }
};

double logsumexp(const std::vector<double>& x, double temperature) {
    const double top = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (const double v : x) sum += std::exp((v - top) / temperature);
    return top / temperature + std::log(sum);
}

std::vector<std::int32_t> sorted_columns(const std::vector<double>& x) {
    std::vector<std::int32_t> ids(x.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](auto a, auto b) { return x[a] > x[b]; });
    return ids;
}

void check_topk(const Case& c, const Outputs& o) {
    for (std::int64_t i = 0; i < c.rows; ++i) {
        const std::vector<double> x = c.logits.row(i, c.logits.columns());
        const std::vector<std::int32_t> ids = sorted_columns(x);
        const double normaliser = logsumexp(x, 1);
        const auto finite = std::count_if(x.begin(), x.end(), [](double v) { return v > -infinity; });
        const std::int64_t kept = std::min<std::int64_t>(c.k, finite);
        CHECK_EQUAL(o.k_eff[i], kept);
        for (std::int64_t j = 0; j < c.k; ++j) {
            CHECK_EQUAL(o.ids[i * c.k + j], j < kept ? ids[j] : -1);
            CHECK_NEAR(o.logprobs[i * c.k + j], j < kept ? x[ids[j]] - normaliser : -infinity, 4e-6);
        }
        for (std::size_t t = 0; t < c.temperatures.size(); ++t) {
            const double tau = c.temperatures[t];
            CHECK_NEAR(o.lse[static_cast<std::int64_t>(t) * c.rows + i], logsumexp(x, tau) - normaliser / tau, 4e-6);
        }
    }
}

}  // namespace

TEST(philox_known_answers) {  // of the authors' Random123
    using Counter = std::array<std::uint32_t, 4>;
    const Counter zero = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    CHECK(cpu::philox({0, 0, 0, 0}, {0, 0}) == zero);
    const Counter pi = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    CHECK(cpu::philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) == pi);
}

TEST(select_topk) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const DType dtype : dtypes)
            for (const std::int64_t columns : {1, 15, 33, 256, 1000, 2048, 5003})
                for (const Layout layout : {exact, guarded}) {
                    const Scope scope(text(columns, " columns, dtype ", static_cast<int>(dtype)));
                    Case c{normal(random, dtype, 3, columns, layout), 3};
                    for (const std::int64_t k : {1, 5, 64, 300, 6000}) {
                        c.k = k;
                        c.temperatures = {1, 2, 0.5, 3};
                        check_topk(c, c.run(kernels));
                    }
                    CHECK(c.logits.guards_hold());
                }
    });
}

TEST(select_a_sure_row) {
    const auto check_row = [](const Case& c, const Outputs& o, std::int64_t i) {
        std::vector<double> x = c.logits.row(i, c.logits.columns());
        const std::int32_t largest = sorted_columns(x)[0];
        const double top = std::exchange(x[static_cast<std::size_t>(largest)], -infinity);
        const auto log_sum = [&](double temperature) {
            double others = 0;
            for (const double v : x) others += std::exp((v - top) / temperature);
            return std::log1p(others);
        };
        CHECK_EQUAL(o.ids[i * c.k], largest);
        CHECK_NEAR(o.logprobs[i * c.k], -log_sum(1), 2e-6 * log_sum(1));
        for (std::size_t t = 0; t < c.temperatures.size(); ++t) {
            const double tau = c.temperatures[t], of_one = log_sum(1) / tau, slack = 2e-6 * (log_sum(tau) + of_one);
            CHECK_NEAR(o.lse[static_cast<std::int64_t>(t) * c.rows + i], log_sum(tau) - of_one, slack);
        }
    };
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const DType dtype : dtypes)
            for (const std::int64_t columns : {2, 33, 2048, 9001})
                for (const double height : {12.0, 20.0, 40.0}) {
                    const Scope scope(text(columns, " columns, dtype ", static_cast<int>(dtype), ", by ", height));
                    Case c{normal(random, dtype, 3, columns, guarded), 3};
                    c.temperatures = {1, 2, 0.5};
                    c.k = 1;
                    for (std::int64_t i = 0; i < 3; ++i)
                        c.logits.set(i, static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(columns)),
                                     height);
                    const Outputs one = c.run(kernels);
                    for (std::int64_t i = 0; i < 3; ++i) check_row(c, one, i);
                    c.threads = 5;
                    CHECK(c.run(kernels).same(one));
                }
        Case c{Matrix(DType::f32, 1, 700, exact), 1};
        c.k = 1;
        for (std::int64_t column = 0; column < 700; ++column) c.logits.set(0, column, column == 433 ? 1e-40 : -20);
        check_row(c, c.run(kernels), 0);  // a denormal
    });
}

TEST(select_ties_and_absent_columns) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const DType dtype : dtypes)
            for (const std::int64_t values : {1, 2, 5}) {
                Case c{Matrix(dtype, 3, 9001, exact), 3};
                for (std::int64_t i = 0; i < c.rows; ++i)
                    for (std::int64_t column = 0; column < 9001; ++column) {
                        const double x = static_cast<double>(random() % static_cast<std::uint64_t>(values));
                        const bool absent = i == 1 ? column % 3 != 0 : i == 2 && (column < 4000 || column % 199 != 0);
                        c.logits.set(i, column, absent ? -infinity : x);
                    }
                for (const std::int64_t k : {1, 64, 2000}) {
                    c.k = k;
                    check_topk(c, c.run(kernels));
                }
            }
    });
}

TEST(select_ascending_rows) {  // the largest columns side by side, which the bins see last
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        Case c{Matrix(DType::f32, 2, 20000, exact), 2};
        for (std::int64_t column = 0; column < 20000; ++column) {
            c.logits.set(0, column, static_cast<double>(column) * 1e-3);
            c.logits.set(1, column, 1e4 - static_cast<double>(column));
        }
        check_topk(c, c.run(kernels));
    });
}

TEST(select_topp) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        Case c{normal(random, DType::f32, 4, 3001, exact), 4, Method::topp, 500, 7};
        for (const double p : {1e-3, 0.3, 0.9, 1.0}) {
            c.p = p;
            const Outputs o = c.run(kernels);
            for (std::int64_t i = 0; i < c.rows; ++i) {
                const std::vector<double> x = c.logits.row(i, 3001);
                const std::vector<std::int32_t> ids = sorted_columns(x);
                const double normaliser = logsumexp(x, 1);
                double mass = 0;
                for (std::int64_t j = 0; j < c.k; ++j) {
                    if (j < o.k_eff[i] && j >= c.least) CHECK(mass < p + 1e-6);
                    if (j < o.k_eff[i]) mass += std::exp(x[ids[j]] - normaliser);
                    CHECK_EQUAL(o.ids[i * c.k + j], j < o.k_eff[i] ? ids[j] : -1);
                }
                CHECK(o.k_eff[i] >= c.least);
                CHECK(mass > p - 1e-6 || o.k_eff[i] == c.k);
            }
        }
    });
}

// Each point of the distribution function must lie within the column it was given to, to rounding.
TEST(select_draws_lie_where_the_uniforms_say) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const DType dtype : dtypes)
            for (const double tau : {1.0, 2.0, 0.7}) {
                Case c{normal(random, dtype, 3, 5003, exact), 3, Method::sample, 200};
                c.temperatures = {tau};
                c.seed = random() >> 1;
                const Outputs o = c.run(kernels);
                for (std::int64_t i = 0; i < c.rows; ++i) {
                    const std::vector<double> x = c.logits.row(i, 5003);
                    const double normaliser = logsumexp(x, tau);
                    std::vector<double> cumulative = {0}, points;
                    for (const double v : x) cumulative.push_back(cumulative.back() + std::exp(v / tau - normaliser));
                    for (std::int64_t j = 0; j < c.k; ++j)
                        points.push_back(
                            cpu::uniform(c.seed, static_cast<std::uint64_t>(i), static_cast<std::uint32_t>(j)));
                    std::sort(points.begin(), points.end());
                    std::size_t point = 0;
                    for (std::int64_t j = 0; j < o.k_eff[i]; ++j) {
                        const std::int32_t id = o.ids[i * c.k + j];
                        const long draws = std::lround(o.mass[i * c.k + j] * static_cast<double>(c.k));
                        for (long draw = 0; draw < draws; ++draw, ++point) {
                            CHECK(points[point] > cumulative[static_cast<std::size_t>(id)] - 1e-6);
                            CHECK(points[point] < cumulative[static_cast<std::size_t>(id) + 1] + 1e-6);
                        }
                    }
                    CHECK_EQUAL(point, points.size());
                }
            }
    });
}

TEST(select_pps_masses) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const DType dtype : dtypes)
            for (const std::int64_t k : {1, 10, 64, 400}) {
                Case c{normal(random, dtype, 4, 3001, exact), 4, Method::pps, k};
                for (std::int64_t column = 0; column < 3001; ++column)
                    if (column % 50 != 0) c.logits.set(3, column, -infinity);  // 61 columns
                const Outputs o = c.run(kernels);
                for (std::int64_t i = 0; i < c.rows; ++i) {
                    const std::vector<double> x = c.logits.row(i, 3001);
                    const double normaliser = logsumexp(x, 1);
                    const double step = *std::min_element(&o.mass[i * k], &o.mass[i * k] + o.k_eff[i]);
                    double mass = 0;
                    CHECK_EQUAL(o.k_eff[i], i == 3 ? std::min<std::int64_t>(k, 61) : k);
                    for (std::int64_t j = 0; j < o.k_eff[i]; ++j) {
                        const double q = std::exp(x[o.ids[i * k + j]] - normaliser);
                        CHECK_NEAR(o.mass[i * k + j], i == 3 && k > 61 ? q : std::max(q, step), 1e-6);
                        mass += static_cast<double>(o.mass[i * k + j]);
                        if (j > 0) CHECK(o.ids[i * k + j] > o.ids[i * k + j - 1]);
                    }
                    // each of the k points stands for as much mass, and what is certain for its own
                    CHECK_NEAR(mass, 1, 1e-5);
                }
            }
    });
}

TEST(select_same_bits_for_any_number_of_threads) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const Method method : {Method::topk, Method::topp, Method::sample, Method::pps})
            for (const std::int64_t rows : {1, 3, 7}) {
                Case c{normal(random, DType::bf16, rows, 20011, exact), rows, method};
                c.temperatures = {2};
                const Outputs one = c.run(kernels);
                for (const int threads : {2, 5, 16}) {
                    c.threads = threads;
                    CHECK(c.run(kernels).same(one));
                }
            }
    });
}

TEST(select_rows_without_a_distribution) {
    for_each_isa([&](const cpu::SelectKernels& kernels) {
        for (const Method method : {Method::topk, Method::topp, Method::sample, Method::pps})
            for (const std::int64_t columns : {40, 3000}) {
                Case c{normal(random, DType::f32, 5, columns, exact), 5, method};
                c.logits.set(1, columns - 1, std::numeric_limits<double>::quiet_NaN());
                c.logits.set(2, 3, infinity);
                for (std::int64_t column = 0; column < columns; ++column) c.logits.set(3, column, -infinity);
                const Outputs o = c.run(kernels);
                for (std::int64_t i = 0; i < c.rows; ++i) {
                    const bool bad = i >= 1 && i <= 3;
                    CHECK_EQUAL(std::isnan(o.lse[i]), bad);
                    CHECK_EQUAL(std::isnan(o.logprobs[i * c.k]), bad);
                    if (c.method == Method::sample || c.method == Method::pps)
                        CHECK_EQUAL(std::isnan(o.neg_entropy[i]), bad);
                    for (std::int64_t j = 0; j < c.k; ++j) {
                        CHECK(o.ids[i * c.k + j] >= -1 && o.ids[i * c.k + j] < columns);
                        if (bad) CHECK_EQUAL(o.ids[i * c.k + j], j < std::min(c.k, columns) ? j : -1);
                    }
                }
            }
    });
}

TEST(select_refuses_what_cannot_be_meant) {
    const cpu::SelectKernels& kernels = *cpu::kernels().select;
    Case c{normal(random, DType::f32, 1, 10, exact), 1};
    c.temperatures = {0};
    CHECK_THROWS(ArgumentError, c.run(kernels));
    c.temperatures = {1, 2};
    c.method = Method::pps;
    CHECK_THROWS(ArgumentError, c.run(kernels));
}
