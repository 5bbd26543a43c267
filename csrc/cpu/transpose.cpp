#include "cpu/transpose.h"

#include <algorithm>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kdfast::cpu {
namespace {

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

void stream_block(const void* from, void* to) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_load_si128(static_cast<const __m128i*>(from)));
}

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

void stream_block(const void*, void*) {}
template <class T>
void transpose_block(const T*, std::int64_t, T*, std::int64_t) {}
#endif

// Out of memory each line is read whole and once, as those of one column may all belong to one set of the cache; the
// lines of later rows are fetched meanwhile, as the hardware's own prefetch ends with each row.
template <class T>
void gather_blocks(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
                   std::int64_t columns) {
    constexpr std::int64_t side = 16 / sizeof(T), line = 64 / sizeof(T), ahead = 32;
    for (std::int64_t top = 0; top < rows; top += line)
        for (std::int64_t left = 0; left < columns; left += line)
            for (std::int64_t i = top; i < std::min(top + line, rows); i += side) {
                for (std::int64_t next = i + ahead; next < std::min(i + ahead + side, rows); ++next)
                    __builtin_prefetch(from + next * from_stride + left, 0, 2);
                for (std::int64_t j = left; j < std::min(left + line, columns); j += side)
                    transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
            }
}

// Into memory a few rows at a time are written, from end to end.
template <class T>
void scatter_blocks(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
                    std::int64_t columns) {
    constexpr std::int64_t side = 16 / sizeof(T);
    for (std::int64_t j = 0; j < columns; j += side)
        for (std::int64_t i = 0; i < rows; i += side)
            transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
}

// The same past the cache, by whole lines, which are put together beside: parts of several took four times as long.
template <class T>
void stream_blocks(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
                   std::int64_t columns) {
    constexpr std::int64_t side = 16 / sizeof(T), line = 64 / sizeof(T);
    alignas(64) T lines[line * line];
    for (std::int64_t left = 0; left < columns; left += line)
        for (std::int64_t top = 0; top < rows; top += line) {
            const std::int64_t height = std::min(line, rows - top), width = std::min(line, columns - left);
            for (std::int64_t i = 0; i < height; i += side)
                for (std::int64_t j = 0; j < width; j += side)
                    transpose_block(from + (top + i) * from_stride + left + j, from_stride, lines + j * line + i, line);
            for (std::int64_t j = 0; j < width; ++j)
                for (std::int64_t i = 0; i < height; i += side)
                    stream_block(lines + j * line + i, to + (left + j) * to_stride + top + i);
        }
}

template <class T>
void transpose_any(Far far, const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
                   std::int64_t columns) {
    constexpr std::int64_t side = 16 / sizeof(T);
    const std::int64_t whole_rows = in_registers ? rows / side * side : 0;
    const std::int64_t whole_columns = in_registers ? columns / side * side : 0;
    const bool aligned = reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && to_stride % side == 0;
    const auto blocks = far == Far::from ? gather_blocks<T> : aligned ? stream_blocks<T> : scatter_blocks<T>;
    blocks(from, from_stride, to, to_stride, whole_rows, whole_columns);
    const std::int64_t below = whole_columns ? whole_rows : 0;
    transpose_part(from + below * from_stride, from_stride, to + below, to_stride, rows - below, whole_columns);
    transpose_part(from + whole_columns, from_stride, to + whole_columns * to_stride, to_stride, rows,
                   columns - whole_columns);
}

}  // namespace

void transpose(Far far, const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride,
               std::int64_t rows, std::int64_t columns, std::size_t size) {
    const auto go = [&]<class T>(T) {
        transpose_any(far, reinterpret_cast<const T*>(from), from_stride, reinterpret_cast<T*>(to), to_stride, rows,
                      columns);
    };
    size == 4 ? go(std::uint32_t{}) : go(std::uint16_t{});
}

void fence_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace kdfast::cpu
