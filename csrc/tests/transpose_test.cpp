// The blocked transposition against a loop over elements.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/error.h"
#include "cpu/transpose.h"
#include "harness.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

template <class T>
void check(Random& random, std::int64_t count, std::int64_t rows, std::int64_t columns, int threads) {
    const Scope scope(text(count, " of ", rows, " x ", columns, ", ", sizeof(T), " bytes, ", threads, " threads"));
    const std::int64_t stride = columns + 3, to_stride = rows + 5;  // rows of something longer
    std::vector<T> from(static_cast<std::size_t>(count * rows * stride)), to;
    for (T& x : from) x = static_cast<T>(random());
    to.assign(static_cast<std::size_t>(count * columns * to_stride), T{7});
    cpu::transpose({reinterpret_cast<std::byte*>(from.data()), rows * stride, stride},
                   {reinterpret_cast<std::byte*>(to.data()), columns * to_stride, to_stride}, count, rows, columns,
                   sizeof(T), threads);
    for (std::int64_t k = 0; k < count; ++k)
        for (std::int64_t j = 0; j < columns; ++j)
            for (std::int64_t i = 0; i < to_stride; ++i) {
                const T want = i < rows ? from[static_cast<std::size_t>((k * rows + i) * stride + j)] : T{7};
                CHECK(to[static_cast<std::size_t>((k * columns + j) * to_stride + i)] == want);
            }
}

}  // namespace

TEST(transpose_moves_every_element_and_touches_no_other) {
    for (const std::int64_t rows : {1, 3, 8, 21, 40, 150})
        for (const std::int64_t columns : {1, 7, 8, 64, 65, 300})
            for (const int threads : {1, 3}) {
                check<std::uint32_t>(random, 2, rows, columns, threads);
                check<std::uint16_t>(random, 2, rows, columns, threads);
            }
    check<std::uint32_t>(random, 0, 3, 4, 1);
}

TEST(transpose_refuses_other_sizes) { CHECK_THROWS(ArgumentError, cpu::transpose({}, {}, 1, 1, 1, 8, 1)); }
