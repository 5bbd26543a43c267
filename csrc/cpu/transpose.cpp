#include "cpu/transpose.h"

#include <algorithm>

#include "core/error.h"
#include "core/threads.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kdfast::cpu {
namespace {

// Columns of one task: some lines of the cache of each row.
constexpr std::int64_t columns_of_task = 256;

template <class T>
void transpose_part(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
                    std::int64_t columns) {
    for (std::int64_t j = 0; j < columns; ++j)
        for (std::int64_t i = 0; i < rows; ++i) to[j * to_stride + i] = from[i * from_stride + j];
}

// Blocks of 16 bytes a row, transposed in registers. SSE2 is part of every x86-64; more is not needed, as memory bounds
// this.
#if defined(__SSE2__)
constexpr bool in_registers = true;

void transpose_block(const std::uint32_t* from, std::int64_t from_stride, std::uint32_t* to, std::int64_t to_stride) {
    __m128i r[4], s[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
    s[0] = _mm_unpacklo_epi32(r[0], r[1]);
    s[1] = _mm_unpackhi_epi32(r[0], r[1]);
    s[2] = _mm_unpacklo_epi32(r[2], r[3]);
    s[3] = _mm_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm_unpacklo_epi64(s[0], s[2]);
    r[1] = _mm_unpackhi_epi64(s[0], s[2]);
    r[2] = _mm_unpacklo_epi64(s[1], s[3]);
    r[3] = _mm_unpackhi_epi64(s[1], s[3]);
    for (int j = 0; j < 4; ++j) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * to_stride), r[j]);
}

void transpose_block(const std::uint16_t* from, std::int64_t from_stride, std::uint16_t* to, std::int64_t to_stride) {
    __m128i r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
    for (int i = 0; i < 4; ++i) {  // rows 2i and 2i + 1
        s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {  // columns 0 to 3, then 4 to 7
        r[4 * half] = _mm_unpacklo_epi32(s[half], s[half + 2]);
        r[4 * half + 1] = _mm_unpackhi_epi32(s[half], s[half + 2]);
        r[4 * half + 2] = _mm_unpacklo_epi32(s[half + 4], s[half + 6]);
        r[4 * half + 3] = _mm_unpackhi_epi32(s[half + 4], s[half + 6]);
    }
    for (int half = 0; half < 2; ++half)
        for (int pair = 0; pair < 2; ++pair) {
            const __m128i first = r[4 * half + pair], second = r[4 * half + pair + 2];
            std::uint16_t* at = to + (4 * half + 2 * pair) * to_stride;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_unpacklo_epi64(first, second));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at + to_stride), _mm_unpackhi_epi64(first, second));
        }
}
#else
constexpr bool in_registers = false;

template <class T>
void transpose_block(const T*, std::int64_t, T*, std::int64_t) {}
#endif

template <class T>
void transpose_columns(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
                       std::int64_t columns) {
    constexpr std::int64_t side = 16 / sizeof(T), line = 64 / sizeof(T);
    const std::int64_t whole_rows = in_registers ? rows / side * side : 0;
    const std::int64_t whole_columns = in_registers ? columns / side * side : 0;
    for (std::int64_t top = 0; top < whole_rows; top += line)  // of a written line, all parts one after the other
        for (std::int64_t j = 0; j < whole_columns; j += side)
            for (std::int64_t i = top; i < std::min(top + line, whole_rows); i += side)
                transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    const std::int64_t below = whole_columns ? whole_rows : 0;
    transpose_part(from + below * from_stride, from_stride, to + below, to_stride, rows - below, whole_columns);
    transpose_part(from + whole_columns, from_stride, to + whole_columns * to_stride, to_stride, rows,
                   columns - whole_columns);
}

template <class T>
void transpose_all(const Matrices& from, const Matrices& to, std::int64_t count, std::int64_t rows,
                   std::int64_t columns, int threads) {
    const std::int64_t parts = (columns + columns_of_task - 1) / columns_of_task;
    parallel_for(count * parts, threads, [&](std::int64_t task) {
        const std::int64_t k = task / parts, j = task % parts * columns_of_task;
        const T* source = reinterpret_cast<const T*>(from.data) + k * from.between + j;
        T* target = reinterpret_cast<T*>(to.data) + k * to.between + j * to.stride;
        transpose_columns(source, from.stride, target, to.stride, rows, std::min(columns_of_task, columns - j));
    });
}

}  // namespace

void transpose(const Matrices& from, const Matrices& to, std::int64_t count, std::int64_t rows, std::int64_t columns,
               int size, int threads) {
    if (count < 1 || rows < 1 || columns < 1) return;
    if (size == 4) {
        transpose_all<std::uint32_t>(from, to, count, rows, columns, threads);
    } else if (size == 2) {
        transpose_all<std::uint16_t>(from, to, count, rows, columns, threads);
    } else {
        throw ArgumentError("transpose: elements must have 2 or 4 bytes");
    }
}

}  // namespace kdfast::cpu
