// Tiles: a stretch of a row as fp32 in the first-level cache, and back. Included by dense_kernel.cpp, once per ISA.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

constexpr std::int64_t tile = 1024;       // columns
constexpr std::int64_t step = 2 * width;  // columns that a loop takes at a time
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
    template <class Io>
    KDFAST_INLINE void fetch(std::int64_t i) const {  // what a step from column i on reads
        constexpr std::int64_t line = 64 / sizeof(typename Io::Element);
        for (std::int64_t k = 0; k < step; k += line) __builtin_prefetch(at + (i + k) * bytes, 0, 2);
    }
};

// How a loop over columns reads logits and writes the gradient. Through a tile of fp32 anything goes; the other two
// spare the common cases the detour: one dtype throughout, read where it lies and written where it belongs, past the
// cache (`streamed`, to aligned memory). A pair holds the columns of a step in an order of its own.
struct DirectFloat {
    using Element = float;
    static constexpr Element absent = -infinity;  // a column that no sum sees
    KDFAST_INLINE static Pair get(const float* p) { return {load(p), load(p + width)}; }
    KDFAST_INLINE static void put(float* p, Pair a, bool streamed) {
        if (streamed) {
            stream(p, a.first);
            stream(p + width, a.second);
        } else {
            store(p, a.first);
            store(p + width, a.second);
        }
    }
};
struct ThroughTile : DirectFloat {
    KDFAST_INLINE static void put(float* p, Pair a, bool) { DirectFloat::put(p, a, false); }
};
struct DirectBf16 {
    using Element = std::uint16_t;
    static constexpr Element absent = 0xff80;
    KDFAST_INLINE static Pair get(const std::uint16_t* p) { return load_bf16_pair(p); }
    KDFAST_INLINE static void put(std::uint16_t* p, Pair a, bool streamed) {
        streamed ? stream_bf16_pair(p, a) : store_bf16_pair(p, a);
    }
};

// The last columns of a tile, fewer than a step, as a whole one.
template <class Io>
struct Tail {
    alignas(64) typename Io::Element values[step];

    const typename Io::Element* fill(const typename Io::Element* from, std::int64_t n) {
        std::fill(std::copy_n(from, n, values), values + step, Io::absent);
        return values;
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

// tanh x, relative error 2e-7: a polynomial where the exponentials would cancel.
KDFAST_INLINE V tanh(V x) {
    const V size = abs(x), square = x * x;
    const V e = exp2(size * set1(-2 * log2e));
    const V far = (set1(1) - e) / (set1(1) + e);
    V y = set1(-5.70498872745e-3f);
    y = fma(y, square, set1(2.06390887954e-2f));
    y = fma(y, square, set1(-5.37397155531e-2f));
    y = fma(y, square, set1(1.33314422036e-1f));
    y = fma(y, square, set1(-3.33332819422e-1f));
    const V near = fma(y * square, x, x);
    return select(less(size, set1(0.625f)), near, select(less(x, set1(0)), set1(0) - far, far));
}

bool plain(const Cap& cap) { return cap.scale == 1 && cap.softcap == 0; }

// Logits from n values as they are stored, to `buffer`, which may hold these.
const float* apply(const Cap& cap, const float* stored, std::int64_t n, float* buffer) {
    const V absent = set1(-infinity), top = set1(cap.softcap);
    const V rate = set1(cap.softcap == 0 ? cap.scale : cap.scale / cap.softcap);
    for (std::int64_t i = 0; i < n; i += width) {
        const V x = load(stored + i), scaled = x * rate;
        store(buffer + i, select(equal(x, absent), absent, cap.softcap == 0 ? scaled : top * tanh(scaled)));
    }
    return buffer;
}

// Turns the gradient of n logits into that of what they follow from.
void apply_derivative(const Cap& cap, const float* logits, std::int64_t n, float* g) {
    const V scale = set1(cap.scale), per_top = set1(cap.softcap == 0 ? 0 : 1 / cap.softcap), one = set1(1);
    for (std::int64_t i = 0; i < n; i += width) {
        const V z = load(logits + i), y = z * per_top;
        const V slope = scale * ((one - y) * (one + y));  // 1 - tanh^2
        store(g + i, select(equal(z, set1(-infinity)), set1(0), load(g + i) * slope));
    }
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
    constexpr std::int64_t vector = width * sizeof(float) / sizeof(Element);
    std::int64_t i = 0;
    while (i < n && reinterpret_cast<std::uintptr_t>(out + i) % (width * sizeof(float)) != 0) {
        out[i] = values[i];
        ++i;
    }
    for (; i + vector <= n; i += vector) stream_vector(out + i, values + i);
    for (; i < n; ++i) out[i] = values[i];
}

void store_tile(DType dtype, std::byte* row, std::int64_t begin, const float* values, std::int64_t n, float* scratch,
                bool streamed) {
    if (dtype == DType::f32) {
        auto* out = reinterpret_cast<float*>(row) + begin;
        streamed ? stream_out(out, values, n) : static_cast<void>(std::copy_n(values, n, out));
        return;
    }
    auto* out = reinterpret_cast<std::uint16_t*>(row) + begin;
    auto* narrowed = streamed ? reinterpret_cast<std::uint16_t*>(scratch) : out;
    dtype == DType::bf16 ? narrow<store_bf16>(narrowed, values, n) : narrow<store_f16>(narrowed, values, n);
    if (streamed) stream_out(out, narrowed, n);
}

template <class Io>
float max_of(const typename Io::Element* x, std::int64_t n) {
    Tail<Io> tail;
    V a = set1(-infinity), b = a;
    for (std::int64_t i = 0; i < n; i += step) {
        const Pair both = Io::get(i + step <= n ? x + i : tail.fill(x + i, n - i));
        a = max(a, both.first);
        b = max(b, both.second);
    }
    return hmax(max(a, b));
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
