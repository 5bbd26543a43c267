// The cache's checksum and rows for one ISA.
#include "cache/kernels.h"

#include <cstring>
#include <limits>

#include "cache/index/blake2b.h"

// clang-format off: the order matters
#if defined(KDFAST_ISA_AVX512_BF16)
#define KDFAST_ISA avx512_bf16
#include "cache/compact/wide.h"
#include "cache/rows/vbmi.h"
#include "cache/crc/vpclmul.h"
#elif defined(KDFAST_ISA_AVX512)
#define KDFAST_ISA avx512
#include "cache/rows/avx512.h"
#include "cache/crc/x86.h"
#elif defined(KDFAST_ISA_AVX2)
#define KDFAST_ISA avx2
#include "cache/rows/avx2.h"
#include "cache/crc/x86.h"
#else
#define KDFAST_ISA generic
#include "cache/rows/generic.h"
#include "cache/crc/generic.h"
#endif
// clang-format on

namespace kdfast::cpu::KDFAST_ISA {
namespace {

using cache::Broken;
using cache::FixedRows;

Broken decode_fixed(FixedRows& f) {
    Ids unpack(f.id_bits);
    const std::byte *ids = f.ids, *deltas = f.deltas;
    std::int32_t* out_ids = f.out_ids;
    float* out = f.out_logprobs;
    for (f.row = 0; f.row < f.rows; ++f.row, out_ids += f.kept, out += f.kept) {
        const std::int64_t k = f.k_of(f.row);
        unpack.decode(ids, k, out_ids);
        const Broken broken = decode_deltas(f, deltas, k, get<float>(f.tops + f.row * 4), out);
        if (broken != Broken::none) return broken;
        for (std::int64_t i = k; i < f.kept; ++i) {
            out_ids[i] = -1;
            out[i] = -std::numeric_limits<float>::infinity();
        }
        ids += cache::id_bytes(k, f.id_bits);
        deltas += cache::delta_bytes(k);
    }
    if (unpack.largest() < f.vocab_size) return Broken::none;
    for (f.row = 0; f.row < f.rows; ++f.row)
        for (std::int64_t i = 0; i < f.k_of(f.row); ++i)
            if (static_cast<std::uint32_t>(f.out_ids[f.row * f.kept + i]) >= f.vocab_size) return Broken::id;
    return Broken::none;
}

// As many doubles as a register has: a compiler takes wider vectors apart by way of memory.
#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif
using Lanes [[gnu::vector_size(register_bytes)]] = double;
using Bits [[gnu::vector_size(register_bytes)]] = std::int64_t;
constexpr int width = register_bytes / 8, parts = 8 / width;

// e^x for x <= 0 to 1e-11 of it; what lies below e^-700 is e^-700.
KDFAST_INLINE void exponential(Lanes& x) {
    constexpr double log2e = 1.4426950408889634, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
    constexpr double shift = 0x1.8p52;  // leaves no room for a fraction, and the integer in the low bits
    constexpr double factorials[] = {1. / 362880, 1. / 40320, 1. / 5040, 1. / 720, 1. / 120,
                                     1. / 24,     1. / 6,     1. / 2,    1.,       1.};
    const Lanes least = Lanes{} - 700.0;
    x = x > least ? x : least;
    const Lanes whole = x * log2e + shift;
    const Lanes n = whole - shift;
    const Lanes r = (x - n * ln2_high) - n * ln2_low;
    Lanes p = Lanes{} + factorials[0];
    for (int i = 1; i < 10; ++i) p = p * r + factorials[i];
    x = reinterpret_cast<Lanes>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(whole) << 52));
}

KDFAST_INLINE double sum_of(const Lanes (&lanes)[parts]) {
    double t[8];
    std::memcpy(t, lanes, sizeof t);
    return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

KDFAST_INLINE void exponential_sum(const double* a, std::int64_t count, double scale, double& sum, double& squares) {
    Lanes total[parts] = {}, squared[parts] = {};
    for (std::int64_t i = 0; i < count; i += 8)
        for (int part = 0; part < parts; ++part) {
            Lanes x;
            std::memcpy(&x, a + i + part * width, sizeof x);
            x *= scale;
            exponential(x);
            total[part] += x;
            squared[part] += x * x;
        }
    sum = sum_of(total);
    squares = sum_of(squared);
}

void exponential_sums(const double* a, const double* b, std::int64_t count, double scale, double* sums) {
    exponential_sum(a, count, scale, sums[0], sums[2]);
    exponential_sum(b, count, scale, sums[1], sums[3]);
}

using Floats [[gnu::vector_size(register_bytes)]] = float;
using FloatBits [[gnu::vector_size(register_bytes)]] = std::int32_t;
constexpr std::int64_t floats = register_bytes / 4;

// Where the processor has these in one instruction; what is added up here need not be the same bits everywhere.
KDFAST_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}
KDFAST_INLINE Floats clamped(Floats x, Floats least, Floats most) {
#if defined(__AVX512F__)
    return _mm512_min_ps(_mm512_max_ps(x, least), most);
#elif defined(__AVX2__)
    return _mm256_min_ps(_mm256_max_ps(x, least), most);
#else
    x = x > least ? x : least;
    return x < most ? x : most;
#endif
}

// As above, in f32: from e^-87 to e^88.
KDFAST_INLINE Floats exponential(Floats x) {
    constexpr float ln2 = 0.693147181f, shift = 0x1.8p23f;
    constexpr float factorials[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    x = clamped(x, Floats{} - 87.0f, Floats{} + 88.0f);
    const Floats whole = fused(x, Floats{} + 1.44269504f, Floats{} + shift);
    const Floats r = fused(whole - shift, Floats{} - ln2, x);
    Floats p = Floats{} + factorials[0];
    for (int i = 1; i < 7; ++i) p = fused(p, r, Floats{} + factorials[i]);
    return reinterpret_cast<Floats>(reinterpret_cast<FloatBits>(p) + (reinterpret_cast<FloatBits>(whole) << 23));
}

KDFAST_INLINE float sum_of(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    float lanes[floats];
    std::memcpy(lanes, &x, sizeof lanes);
    for (std::int64_t half = floats / 2; half > 0; half /= 2)
        for (std::int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
#endif
}

// What `add` makes of all x, in `sums` sums: add(lanes, totals) adds to each of totals.
template <int sums, class Add>
KDFAST_INLINE void sum_up(const float* x, std::int64_t count, float* to, Add add) {
    constexpr int at_once = 4;
    Floats total[at_once][sums] = {};
    const auto take = [&](const float* from, int part) KDFAST_INLINE_LAMBDA {
        Floats lanes;
        std::memcpy(&lanes, from, sizeof lanes);
        add(lanes, total[part]);
    };
    std::int64_t i = 0;
    for (; i + at_once * floats <= count; i += at_once * floats)
        for (int part = 0; part < at_once; ++part) take(x + i + part * floats, part);
    for (; i + floats <= count; i += floats) take(x + i, 0);
    if (i < count) {
        float rest[floats];
        for (std::int64_t j = 0; j < floats; ++j)
            rest[j] = i + j < count ? x[i + j] : -std::numeric_limits<float>::max();
        take(rest, 1);
    }
    for (int s = 0; s < sums; ++s) {
        to[s] = sum_of((total[0][s] + total[1][s]) + (total[2][s] + total[3][s]));
    }
}

float mass(const float* x, std::int64_t count, float scale, float shift) {
    float sum;
    sum_up<1>(x, count, &sum, [&](Floats lanes, Floats* totals) KDFAST_INLINE_LAMBDA {
        totals[0] += exponential(fused(lanes, Floats{} + scale, Floats{} - shift));
    });
    return sum;
}

void masses(const float* x, std::int64_t count, float* sums) {
    sum_up<2>(x, count, sums, [](Floats lanes, Floats* totals) KDFAST_INLINE_LAMBDA {
        const Floats root = exponential(lanes * 0.5f);
        totals[0] += root;
        totals[1] = fused(root, root, totals[1]);
    });
}

// As many keys at a time as a register has words; one where they could not be turned in it.
#if defined(__AVX2__)
using Words [[gnu::vector_size(register_bytes)]] = std::uint64_t;
constexpr std::int64_t keys_at_once = register_bytes / 8;
KDFAST_INLINE void set(Words& words, std::int64_t lane, std::uint64_t word) { words[lane] = word; }
KDFAST_INLINE std::uint64_t get(const Words& words, std::int64_t lane) { return words[lane]; }
#else
using Words = std::uint64_t;
constexpr std::int64_t keys_at_once = 1;
KDFAST_INLINE void set(Words& words, std::int64_t, std::uint64_t word) { words = word; }
KDFAST_INLINE std::uint64_t get(const Words& words, std::int64_t) { return words; }
#endif

void hash_keys(const cache::KeyBytes* keys, std::int64_t count, std::uint64_t (*hashes)[2]) {
    using namespace cache::blake2b;
    for (std::int64_t first = 0; first < count; first += keys_at_once) {
        const std::int64_t lanes = count - first < keys_at_once ? count - first : keys_at_once;
        Words block[16] = {}, sizes = {}, state[8];
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            const cache::KeyBytes& key = keys[first + lane];
            std::uint64_t words[16] = {};
            if (key.size > 0) std::memcpy(words, key.data, key.size);
            for (std::size_t w = 0; w * 8 < key.size; ++w) set(block[w], lane, words[w]);
            set(sizes, lane, key.size);
        }
        for (int i = 0; i < 8; ++i) state[i] = Words{} + initial[i];
        state[0] ^= Words{} + parameters;
        compress(state, block, sizes, Words{} + ~std::uint64_t{0});
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
            hashes[first + lane][0] = get(state[0], lane);
            hashes[first + lane][1] = get(state[1], lane);
        }
    }
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA

#if defined(KDFAST_ISA_AVX512_BF16)
#define KDFAST_DECODE_COMPACT cpu::KDFAST_ISA::decode_compact
#else  // where a register's lanes are gathered by microcode, or are too few, it would take longer than one by one
#define KDFAST_DECODE_COMPACT decode_entries
#endif
#define KDFAST_CONCAT(a, b) a##b
#define KDFAST_KERNELS(isa) KDFAST_CONCAT(isa, _kernels)

namespace kdfast::cache {
const Kernels KDFAST_KERNELS(KDFAST_ISA) = {
    cpu::KDFAST_ISA::crc32c,        cpu::KDFAST_ISA::decode_fixed,     KDFAST_DECODE_COMPACT,
    cpu::KDFAST_ISA::count_escapes, cpu::KDFAST_ISA::exponential_sums, cpu::KDFAST_ISA::mass,
    cpu::KDFAST_ISA::masses,        cpu::KDFAST_ISA::hash_keys};
}  // namespace kdfast::cache
