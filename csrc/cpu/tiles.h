// Tiles: a stretch of a row as fp32 in the first-level cache, and back. Included by dense_kernel.cpp, once per ISA.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

constexpr std::int64_t tile = 1024;  // columns
constexpr float infinity = std::numeric_limits<float>::infinity();

// Memory that will be read soon, to be fetched while arithmetic goes on: column i of what comes is at `at + i * bytes`.
// A tile's arithmetic hides the fetch of the next tile, a gradient's that of the next row; the hardware's own prefetch
// ends with each page.
struct Ahead {
    const std::byte* at;
    std::int64_t bytes;  // a column; 0 where there is nothing to fetch

    static Ahead of(const std::byte* row, DType dtype, std::int64_t column) {
        const auto size = static_cast<std::int64_t>(size_of(dtype));
        return {row + column * size, size};
    }
    void fetch(std::int64_t i) const { __builtin_prefetch(at + i * bytes, 0, 2); }
};

// How a loop over columns reads logits and writes the gradient. Through a tile of fp32 anything goes; the other two
// spare the common cases the detour: whole vectors of one dtype throughout, to aligned memory, streamed past the cache.
// 16-bit gradients that take the place of their logits are stored instead: to stream a quarter of a line, of which the
// rest is still to be read, took twice to seven times as long, while in fp32 streaming won there too.
struct ThroughTile {
    using Element = float;
    KDFAST_INLINE static V get(const float* p) { return load(p); }
    KDFAST_INLINE static void put(float* p, V a, bool) { store(p, a); }
};
struct DirectFloat {
    using Element = float;
    KDFAST_INLINE static V get(const float* p) { return load(p); }
    KDFAST_INLINE static void put(float* p, V a, bool streamed) { streamed ? stream(p, a) : store(p, a); }
};
struct DirectBf16 {
    using Element = std::uint16_t;
    KDFAST_INLINE static V get(const std::uint16_t* p) { return load_bf16(p); }
    KDFAST_INLINE static void put(std::uint16_t* p, V a, bool streamed) {
        streamed ? stream_bf16(p, a) : store_bf16(p, a);
    }
};

struct Buffers {  // one thread's scratch
    alignas(64) float z[tile], t[tile], mix[tile], g[tile];
};

std::int64_t padded(std::int64_t n) { return (n + width - 1) / width * width; }

// fp32 values of [begin, begin + n) of a row, up to padded(n): the row's own memory where it can be used as it is,
// `buffer` otherwise. What is added at the end is -inf, a column that no sum sees.
template <V (*Load)(const std::uint16_t*)>
const float* widen(const std::byte* row, std::int64_t begin, std::int64_t n, float* buffer) {
    const auto* source = reinterpret_cast<const std::uint16_t*>(row) + begin;
    std::int64_t i = 0;
    for (; i + width <= n; i += width) store(buffer + i, Load(source + i));
    if (i < n) {
        std::uint16_t last[width] = {};
        std::memcpy(last, source + i, static_cast<std::size_t>(n - i) * 2);
        store(buffer + i, Load(last));
        std::fill(buffer + n, buffer + padded(n), -infinity);
    }
    return buffer;
}

const float* load_tile(const std::byte* row, DType dtype, std::int64_t begin, std::int64_t n, float* buffer) {
    switch (dtype) {
        case DType::bf16:
            return widen<load_bf16>(row, begin, n, buffer);
        case DType::f16:
            return widen<load_f16>(row, begin, n, buffer);
        case DType::f32:
            break;
    }
    const float* source = reinterpret_cast<const float*>(row) + begin;
    if (n % width == 0) return source;
    std::memcpy(buffer, source, static_cast<std::size_t>(n) * 4);
    std::fill(buffer + n, buffer + padded(n), -infinity);
    return buffer;
}

template <void (*Store)(std::uint16_t*, V)>
void narrow(std::uint16_t* out, const float* values, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + width <= n; i += width) Store(out + i, load(values + i));
    if (i < n) {
        std::uint16_t last[width];
        Store(last, load(values + i));
        std::memcpy(out + i, last, static_cast<std::size_t>(n - i) * 2);
    }
}

// Copies n elements past the cache: the gradient is not read again here, and a line that is written in full that way
// need not be fetched first. The source may lie at any address, the target at any that suits its element.
template <class Element>
void stream_out(Element* out, const Element* values, std::int64_t n) {
    constexpr std::int64_t step = width * sizeof(float) / sizeof(Element);
    std::int64_t i = 0;
    while (i < n && reinterpret_cast<std::uintptr_t>(out + i) % (width * sizeof(float)) != 0) {
        out[i] = values[i];
        ++i;
    }
    for (; i + step <= n; i += step) stream_vector(out + i, values + i);
    for (; i < n; ++i) out[i] = values[i];
}

void store_tile(DType dtype, std::byte* row, std::int64_t begin, const float* values, std::int64_t n, float* scratch) {
    if (dtype == DType::f32) return stream_out(reinterpret_cast<float*>(row) + begin, values, n);
    auto* narrowed = reinterpret_cast<std::uint16_t*>(scratch);
    dtype == DType::bf16 ? narrow<store_bf16>(narrowed, values, n) : narrow<store_f16>(narrowed, values, n);
    stream_out(reinterpret_cast<std::uint16_t*>(row) + begin, narrowed, n);
}

template <class Io>
float max_of(const typename Io::Element* x, std::int64_t n) {
    V a = set1(-infinity), b = a;
    std::int64_t i = 0;
    for (; i + 2 * width <= n; i += 2 * width) {
        a = max(a, Io::get(x + i));
        b = max(b, Io::get(x + i + width));
    }
    if (i < n) a = max(a, Io::get(x + i));
    return hmax(max(a, b));
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
