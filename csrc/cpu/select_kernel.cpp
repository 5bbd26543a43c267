// What the selection of sparse targets does to a tile of logits, for one ISA; see select.cpp for what it is good for.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/dense.h"
#include "cpu/select.h"

// clang-format off: the order matters
#if defined(KDFAST_ISA_AVX512_BF16)
#define KDFAST_ISA avx512_bf16
#include "cpu/simd_avx512.h"
#elif defined(KDFAST_ISA_AVX512)
#define KDFAST_ISA avx512
#include "cpu/simd_avx512.h"
#elif defined(KDFAST_ISA_AVX2)
#define KDFAST_ISA avx2
#include "cpu/simd_avx2.h"
#else
#define KDFAST_ISA generic
#include "cpu/simd_generic.h"
#endif
#include "cpu/divergences.h"
// clang-format on

namespace kdfast::cpu::KDFAST_ISA {
namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
constexpr std::int64_t pair = 2 * width;  // columns that a loop takes at a time
constexpr std::int64_t block = width * select_block_vectors;
static_assert(select_tile(DType::f32) % block == 0 && select_tile(DType::bf16) % block == 0 && block % pair == 0);

struct F32 {
    using Element = float;
    static constexpr Element absent = minus_infinity;  // a column that neither a maximum nor a sum sees
    KDFAST_INLINE static V get(const float* p) { return load(p); }
    KDFAST_INLINE static Pair any_order(const float* p) { return {load(p), load(p + width)}; }
};
struct Bf16 {
    using Element = std::uint16_t;
    static constexpr Element absent = 0xff80;
    KDFAST_INLINE static V get(const std::uint16_t* p) { return load_bf16(p); }
    KDFAST_INLINE static Pair any_order(const std::uint16_t* p) { return load_bf16_pair(p); }
};
struct F16 {
    using Element = std::uint16_t;
    static constexpr Element absent = 0xfc00;
    KDFAST_INLINE static V get(const std::uint16_t* p) { return load_f16(p); }
    KDFAST_INLINE static Pair any_order(const std::uint16_t* p) { return {load_f16(p), load_f16(p + width)}; }
};

// 2^x; anything where that overflows.
KDFAST_INLINE V power(V x) { return exp2(exp2_overflows ? x : min(set1(127), x)); }

// Where to read columns i to i + pair of n, those past the end being absent.
template <class Io>
class Columns {
  public:
    using Element = typename Io::Element;
    Columns(const Element* x, std::int64_t n) : x_(x), n_(n) {}

    KDFAST_INLINE const Element* from(std::int64_t i) {
        if (i + pair <= n_) return x_ + i;
        std::fill(std::copy_n(x_ + i, n_ - i, last_), last_ + pair, Io::absent);
        return last_;
    }

  private:
    const Element* x_;
    std::int64_t n_;
    alignas(64) Element last_[pair];
};

template <class Io>
float max_of(Columns<Io>& x, std::int64_t n) {
    V a = set1(minus_infinity), b = a;
    for (std::int64_t i = 0; i < n; i += pair) {
        const Pair both = Io::any_order(x.from(i));
        a = max(both.first, a);
        b = max(both.second, b);
    }
    return hmax(max(a, b));
}

// Sums of one exponential and, with Maxima, the maxima, of which it returns the largest. The arithmetic of one tile
// hides the fetch of the next.
template <class Io, bool Squared, bool Blocks, bool Maxima>
float sum(Columns<Io>& x, const ScanTile& t, float reference, const Exponential& exponential) {
    const V from = set1(-reference * exponential.c), c = set1(exponential.c);
    V s0 = set1(0), s1 = s0, q0 = s0, q1 = s0, top = set1(minus_infinity);
    float total = 0;
    for (std::int64_t begin = 0, index = 0; begin < t.columns; begin += block, ++index) {
        V m0 = set1(minus_infinity), m1 = m0;
        for (std::int64_t i = begin, end = std::min(begin + block, t.columns); i < end; i += pair) {
            constexpr std::int64_t size = sizeof(typename Io::Element);
            if (Maxima && t.ahead)
                for (std::int64_t byte = 0; byte < pair * size; byte += 64)
                    __builtin_prefetch(t.ahead + i * size + byte);
            const Pair both = Io::any_order(x.from(i));
            const V a = power(affine(both.first, c, from)), b = power(affine(both.second, c, from));
            s0 = s0 + a;
            s1 = s1 + b;
            if constexpr (Squared) {
                q0 = fma(a, a, q0);
                q1 = fma(b, b, q1);
            }
            if constexpr (Maxima) {
                m0 = max(both.first, m0);
                m1 = max(both.second, m1);
            }
        }
        if constexpr (Maxima) {
            m0 = max(m0, m1);
            store(t.maxima + index * width, m0);
            top = max(top, m0);
        }
        if constexpr (Blocks) {
            t.block_sums[index] = hsum(s0 + s1);
            total += t.block_sums[index];
            s0 = s1 = set1(0);
        }
    }
    t.sums[exponential.at] = Blocks ? total : hsum(s0 + s1);
    if constexpr (Squared) t.sums[exponential.squared_at] = hsum(q0 + q1);
    return Maxima ? hmax(top) : 0;
}

template <class Io, bool First, bool Maxima>
float sum(Columns<Io>& x, const ScanTile& t, float reference, const Exponential& e) {
    if (First && t.block_sums)
        return e.squared_at < 0 ? sum<Io, false, true, Maxima>(x, t, reference, e)
                                : sum<Io, true, true, Maxima>(x, t, reference, e);
    return e.squared_at < 0 ? sum<Io, false, false, Maxima>(x, t, reference, e)
                            : sum<Io, true, false, Maxima>(x, t, reference, e);
}

// What the reference may be exceeded by, in powers of two: sums, of squares too, stay far from overflow.
constexpr float headroom = 40;

// The first block's maximum is reference for the tile, so that one loop finds maxima and sums; where it turns out to be
// too low, sums are taken again.
template <class Io>
void scan_columns(const ScanTile& t) {
    Columns<Io> x(reinterpret_cast<const typename Io::Element*>(t.data), t.columns);
    float reference = max_of(x, std::min(block, t.columns));
    if (reference == minus_infinity) reference = max_of(x, t.columns);
    if (reference == minus_infinity) reference = 0;
    float steepest = 0;
    for (std::int64_t i = 0; i < t.exponentials_count; ++i) {
        const Exponential& e = t.exponentials[i];
        steepest = std::max(steepest, e.squared_at < 0 ? e.c : 2 * e.c);
    }
    *t.max = sum<Io, true, true>(x, t, reference, t.exponentials[0]);
    if ((*t.max - reference) * steepest > headroom) {
        reference = *t.max;
        sum<Io, true, false>(x, t, reference, t.exponentials[0]);
    }
    for (std::int64_t i = 1; i < t.exponentials_count; ++i) sum<Io, false, false>(x, t, reference, t.exponentials[i]);
    *t.reference = reference;
}

// Bins are the lanes of groups of blocks, about four times k of them: with that many, few columns above the k-th
// largest bin's maximum are not alone in their bins. Bisection ends where nearly k bins are above.
float floor_of(const float* maxima, std::int64_t blocks, std::int64_t k, float* bins) {
    const std::int64_t group = std::clamp<std::int64_t>(blocks * width / (4 * k), 1, blocks);
    float* end = bins;
    V top = set1(minus_infinity);
    for (std::int64_t begin = 0; begin < blocks; begin += group, end += width) {
        V a = set1(minus_infinity);
        for (std::int64_t b = begin; b < std::min(begin + group, blocks); ++b) a = max(load(maxima + b * width), a);
        store(end, a);
        top = max(top, a);
    }
    const auto above = [&](float floor) {
        std::int64_t n = 0;
        for (const float* bin = bins; bin < end; bin += width) n += std::popcount(bits(less(set1(floor), load(bin))));
        return n;
    };
    const float highest = hmax(top);
    float low = highest, high = highest;
    std::int64_t n = 0;
    for (float span = 0.5f; n < k && low != minus_infinity; span *= 2) {
        high = low;
        low = highest - span;
        n = above(low);
    }
    for (int i = 0; i < 20 && n > k + k / 8 && low != minus_infinity; ++i) {
        const float middle = low + (high - low) / 2;
        const std::int64_t there = above(middle);
        (there < k ? high : low) = middle;
        if (there >= k) n = there;
    }
    return low;
}

template <class Io>
void collect_columns(Collection& c) {
    const V floor = set1(c.floor);
    const auto* row = reinterpret_cast<const typename Io::Element*>(c.row);
    for (; c.block * block < c.columns && c.count + block <= c.room; ++c.block) {
        if (!bits(less(floor, load(c.maxima + c.block * width)))) continue;
        const std::int64_t first = c.block * block, n = std::min(block, c.columns - first);
        Columns<Io> x(row + first, n);
        for (std::int64_t i = 0; i < n; i += pair) {
            const auto* at = x.from(i);
            for (std::int64_t j = 0; j < pair; j += width) {
                const V value = Io::get(at + j);
                unsigned hits = bits(less(floor, value));
                if (!hits) continue;
                alignas(64) float values[width];
                store(values, value);
                for (; hits; hits &= hits - 1) {
                    const int lane = std::countr_zero(hits);
                    c.keys[c.count++] = key_of(values[lane], first + i + j + lane);
                }
            }
        }
    }
}

template <class Io>
void weigh(const std::byte* data, std::int64_t n, float reference, float scale, float* out) {
    Columns<Io> x(reinterpret_cast<const typename Io::Element*>(data), n);
    const V from = set1(-reference * scale), c = set1(scale), least = set1(std::numeric_limits<float>::min());
    const auto weight = [&](V column) KDFAST_INLINE_LAMBDA {
        const V w = power(affine(column, c, from));
        return select(less(w, least), set1(0), w);  // what a sum counts as 0, as it flushes denormals
    };
    alignas(64) float last[pair];
    for (std::int64_t i = 0; i < n; i += pair) {
        const auto* at = x.from(i);
        float* to = i + pair <= n ? out + i : last;
        store(to, weight(Io::get(at)));
        store(to + width, weight(Io::get(at + width)));
        if (to == last) std::copy_n(last, n - i, out + i);
    }
}

void scan(const ScanTile& t) {
    const FlushDenormals flush;
    t.dtype == DType::f32    ? scan_columns<F32>(t)
    : t.dtype == DType::bf16 ? scan_columns<Bf16>(t)
                             : scan_columns<F16>(t);
}

void collect(Collection& c) {
    c.dtype == DType::f32    ? collect_columns<F32>(c)
    : c.dtype == DType::bf16 ? collect_columns<Bf16>(c)
                             : collect_columns<F16>(c);
}

void weights(const std::byte* x, DType dtype, std::int64_t n, float reference, float c, float* out) {
    const FlushDenormals flush;
    dtype == DType::f32    ? weigh<F32>(x, n, reference, c, out)
    : dtype == DType::bf16 ? weigh<Bf16>(x, n, reference, c, out)
                           : weigh<F16>(x, n, reference, c, out);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA

#define KDFAST_CONCAT(a, b) a##b
#define KDFAST_SELECT(isa) KDFAST_CONCAT(isa, _select)

namespace kdfast::cpu {
const SelectKernels KDFAST_SELECT(KDFAST_ISA) = {KDFAST_ISA::width, KDFAST_ISA::scan, KDFAST_ISA::floor_of,
                                                 KDFAST_ISA::collect, KDFAST_ISA::weights};
}  // namespace kdfast::cpu
