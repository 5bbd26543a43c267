// The two kernels beside the losses: a matrix times a number, and the triad.
#include <cmath>
#include <cstdint>
#include <vector>

#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;

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
