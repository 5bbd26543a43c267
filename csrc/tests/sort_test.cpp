// The sort of rows against std::stable_sort.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "cpu/sort.h"
#include "harness.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

// Whether a comes before b: NaN first, then the larger.
bool before(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// Bits of any kind, few different values, or values whose low 16 bits are 0 as those of what was bf16.
float draw(Random& random, int kind) {
    const auto bits = static_cast<std::uint32_t>(random());
    if (kind == 1) return static_cast<float>(bits % 5) - 2.0f;
    return std::bit_cast<float>(kind == 2 ? bits & 0xffff0000u : bits);
}

}  // namespace

TEST(sort_rows_is_a_stable_descending_sort) {
    for (const std::int64_t columns : {1, 2, 17, 2047, 5000})
        for (const std::int64_t rows : {0, 1, 3})
            for (int kind = 0; kind < 3; ++kind)
                for (const int threads : {1, 4}) {
                    const Scope scope(text(rows, " x ", columns, ", kind ", kind, ", ", threads, " threads"));
                    const auto size = static_cast<std::size_t>(rows * columns);
                    std::vector<float> x(size), values(size);
                    std::vector<std::int64_t> order(size, -1);
                    for (float& v : x) v = draw(random, kind);
                    cpu::sort_rows(x.data(), rows, columns, values.data(), order.data(), threads);
                    for (std::int64_t row = 0; row < rows; ++row) {
                        const float* in = x.data() + row * columns;
                        std::vector<std::int64_t> want(static_cast<std::size_t>(columns));
                        std::iota(want.begin(), want.end(), 0);
                        std::stable_sort(want.begin(), want.end(),
                                         [&](std::int64_t a, std::int64_t b) { return before(in[a], in[b]); });
                        const auto at = static_cast<std::size_t>(row * columns);
                        CHECK(std::equal(want.begin(), want.end(), order.begin() + static_cast<std::ptrdiff_t>(at)));
                        for (std::size_t j = 0; j < want.size(); ++j) CHECK_NEAR(values[at + j], in[want[j]], 0.0);
                    }
                    cpu::sort_rows(x.data(), rows, columns, x.data(), nullptr, threads);  // in place, without order
                    for (std::size_t j = 0; j < size; ++j) CHECK_NEAR(x[j], values[j], 0.0);
                }
}

TEST(sort_rows_refuses_what_it_cannot_count) {
    float value = 0;
    for (const std::int64_t columns : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 32})
        CHECK_THROWS(ArgumentError, cpu::sort_rows(&value, 1, columns, &value, nullptr, 1));
}
