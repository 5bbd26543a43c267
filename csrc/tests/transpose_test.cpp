// The blocked transposition against a loop over elements.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/transpose.h"
#include "harness.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

template <class T>
void check(Random& random, cpu::Far far, std::int64_t rows, std::int64_t columns, std::int64_t gap) {
    const Scope scope(
        text(rows, " x ", columns, ", gap ", gap, ", ", sizeof(T), " bytes, far ", static_cast<int>(far)));
    const std::int64_t stride = columns + 3, to_stride = (rows + 15) / 16 * 16 + gap;  // rows of something longer
    std::vector<T> from(static_cast<std::size_t>(rows * stride));
    for (T& x : from) x = static_cast<T>(random());
    std::vector<T> to(static_cast<std::size_t>(columns * to_stride), T{7});
    cpu::transpose(far, reinterpret_cast<std::byte*>(from.data()), stride, reinterpret_cast<std::byte*>(to.data()),
                   to_stride, rows, columns, sizeof(T));
    for (std::int64_t j = 0; j < columns; ++j)
        for (std::int64_t i = 0; i < to_stride; ++i) {
            const T want = i < rows ? from[static_cast<std::size_t>(i * stride + j)] : T{7};
            CHECK(to[static_cast<std::size_t>(j * to_stride + i)] == want);
        }
}

}  // namespace

TEST(transpose_moves_every_element_and_touches_no_other) {
    for (const std::int64_t rows : {1, 3, 8, 21, 40, 150})
        for (const std::int64_t columns : {1, 7, 8, 64, 65, 300})
            for (const std::int64_t gap : {0, 5})  // the aligned rows of gap 0 are streamed
                for (const cpu::Far far : {cpu::Far::from, cpu::Far::to}) {
                    check<std::uint32_t>(random, far, rows, columns, gap);
                    check<std::uint16_t>(random, far, rows, columns, gap);
                }
}
