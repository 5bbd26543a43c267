// A radix sort, least significant digit first: three passes of 11, 11 and 10 bits, whatever the values. On 32,000 to
// 262,144 columns the tables of counts lie in L1 and the keys in L2, so it needs no comparison and no branch.
#include "cpu/sort.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <memory>
#include <utility>

#include "core/error.h"
#include "core/threads.h"

namespace kdfast::cpu {
namespace {

constexpr int digit_bits = 11;
constexpr int digits = 3;
constexpr std::uint32_t digit_mask = (1u << digit_bits) - 1;
using Counts = std::array<std::array<std::uint32_t, digit_mask + 1>, digits>;

// Ascending keys are descending values. All NaN are one, the first; -0 is +0.
std::uint32_t key_of(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x + 0.0f);
    const std::uint32_t key = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
    return x != x ? 0 : key;
}

float value_of(std::uint32_t key) {
    if (key == 0) return std::numeric_limits<float>::quiet_NaN();
    return std::bit_cast<float>(key & 0x80000000u ? key : ~key & 0x7fffffffu);
}

// What is moved: a key alone, or a key with its column in the low half.
std::uint32_t key_in(std::uint32_t item) { return item; }
std::uint32_t key_in(std::uint64_t item) { return static_cast<std::uint32_t>(item >> 32); }

template <class Item>
void sort_row(const float* x, std::uint32_t n, Item* from, Item* to, float* values, std::int64_t* order) {
    Counts counts{};
    for (std::uint32_t j = 0; j < n; ++j) {
        const std::uint32_t key = key_of(x[j]);
        if constexpr (sizeof(Item) == 8) {
            from[j] = static_cast<std::uint64_t>(key) << 32 | j;
        } else {
            from[j] = key;
        }
        for (int d = 0; d < digits; ++d) ++counts[d][key >> (d * digit_bits) & digit_mask];
    }
    for (int d = 0; d < digits; ++d) {
        auto& starts = counts[d];
        const int shift = d * digit_bits;
        // One digit for all, as the low bits of what was bf16 or fp16: nothing moves.
        const bool last = d == digits - 1;
        if (!last && starts[key_in(from[0]) >> shift & digit_mask] == n) continue;
        std::uint32_t sum = 0;
        for (std::uint32_t& start : starts) sum += std::exchange(start, sum);
        for (std::uint32_t j = 0; j < n; ++j) {
            const Item item = from[j];
            const std::uint32_t place = starts[key_in(item) >> shift & digit_mask]++;
            if (last) {
                values[place] = value_of(key_in(item));
                if constexpr (sizeof(Item) == 8) order[place] = static_cast<std::uint32_t>(item);
            } else {
                to[place] = item;
            }
        }
        std::swap(from, to);
    }
}

template <class Item>
void sort_range(const float* x, std::int64_t begin, std::int64_t end, std::int64_t columns, float* values,
                std::int64_t* order) {
    const auto n = static_cast<std::size_t>(columns);
    const auto scratch = std::make_unique_for_overwrite<Item[]>(2 * n);
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t at = row * columns;
        sort_row<Item>(x + at, static_cast<std::uint32_t>(n), scratch.get(), scratch.get() + n, values + at,
                       order ? order + at : nullptr);
    }
}

}  // namespace

void sort_rows(const float* x, std::int64_t rows, std::int64_t columns, float* values, std::int64_t* order,
               int threads) {
    if (columns < 1 || columns > std::numeric_limits<std::uint32_t>::max())
        throw ArgumentError("columns must lie in [1, 2^32)");
    const std::int64_t tasks = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(rows, 1));
    parallel_for(tasks, threads, [&](std::int64_t task) {
        const std::int64_t begin = rows * task / tasks, end = rows * (task + 1) / tasks;
        if (order) {
            sort_range<std::uint64_t>(x, begin, end, columns, values, order);
        } else {
            sort_range<std::uint32_t>(x, begin, end, columns, values, order);
        }
    });
}

}  // namespace kdfast::cpu
