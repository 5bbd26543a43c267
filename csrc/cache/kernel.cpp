// The cache's checksum and rows for one ISA.
#include "cache/kernels.h"

#include <limits>

// clang-format off: the order matters
#if defined(KDFAST_ISA_AVX512_BF16)
#define KDFAST_ISA avx512_bf16
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

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA

#define KDFAST_CONCAT(a, b) a##b
#define KDFAST_KERNELS(isa) KDFAST_CONCAT(isa, _kernels)

namespace kdfast::cache {
const Kernels KDFAST_KERNELS(KDFAST_ISA) = {cpu::KDFAST_ISA::crc32c, cpu::KDFAST_ISA::decode_fixed,
                                            cpu::KDFAST_ISA::count_escapes, cpu::KDFAST_ISA::exponential_sums};
}  // namespace kdfast::cache
