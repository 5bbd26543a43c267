// What every ISA provides for the cache: the checksum, and what a block's rows cost.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache/broken.h"
#include "cache/compact/entries.h"

namespace kdfast::cache {

// Rows of a fixed block (FORMAT.md, section 6.1), end to end. Up to 64 bytes behind any of them may be loaded, and one
// byte before deltas.
struct FixedRows {
    std::int64_t rows = 0;
    std::int64_t kept = 0;                 // K
    const std::uint16_t* k_eff = nullptr;  // (rows); null: K each
    unsigned id_bits = 0;
    std::uint32_t vocab_size = 0;
    float step = 0;  // 2^-grid
    const std::byte* tops = nullptr;
    const std::byte* ids = nullptr;
    const std::byte* deltas = nullptr;
    const std::byte* escapes = nullptr;  // moves on as they are read
    const std::byte* escapes_end = nullptr;
    std::int32_t* out_ids = nullptr;  // (rows, K)
    float* out_logprobs = nullptr;    // (rows, K)

    std::int64_t row = 0;  // on failure: where

    [[gnu::always_inline]] std::int64_t k_of(std::int64_t i) const { return k_eff ? k_eff[i] : kept; }
};

// How long the fields of a row with k entries are, in bytes.
[[gnu::always_inline]] constexpr std::int64_t id_bytes(std::int64_t k, unsigned bits) { return (k * bits + 7) / 8; }
[[gnu::always_inline]] constexpr std::int64_t delta_bytes(std::int64_t k) { return k / 2; }  // k - 1 nibbles

inline constexpr std::uint32_t steps_limit = 1 << 24;
inline constexpr unsigned delta_escaped = 15;    // a nibble that says that the escapes hold the delta
inline constexpr unsigned escape_escaped = 255;  // an escape that says that a u32 follows
inline constexpr std::uint32_t least_long_delta = delta_escaped + escape_escaped;

// A key of at most 128 bytes.
struct KeyBytes {
    const std::byte* data = nullptr;
    std::size_t size = 0;
};

struct Kernels {
    // The checksum's register, without the final exclusive-or.
    std::uint32_t (*crc32c)(const std::byte* bytes, std::size_t count, std::uint32_t state);
    Broken (*decode_fixed)(FixedRows&);
    // Moves states and words on. Broken::words: a lane ends too early.
    Broken (*decode_compact)(CompactEntries&);
    // How many nibbles of `count` bytes ask for an escape.
    std::int64_t (*count_escapes)(const std::byte* deltas, std::int64_t count);
    // sums[0] = sum of e^(a[i] scale), sums[1] the same of b, sums[2] and sums[3] those of the squares of the same
    // exponentials; 8 lanes are summed one by one, so that every ISA finds the same bits. a, b <= 0; count is a
    // multiple of 8.
    void (*exponential_sums)(const double* a, const double* b, std::int64_t count, double scale, double* sums);
    // sum of e^(x[i] scale - shift) in f32, of up to 512 terms of at most 1 to 3e-6 of it.
    float (*mass)(const float* x, std::int64_t count, float scale, float shift);
    // sums[0] = sum of e^(x[i] / 2), sums[1] = sum of e^x[i], as mass: the second are the squares of the first.
    void (*masses)(const float* x, std::int64_t count, float* sums);
    // The two words of each key's hash (index/key_hash.h).
    void (*hash_keys)(const KeyBytes* keys, std::int64_t count, std::uint64_t (*hashes)[2]);
};

extern const Kernels generic_kernels;
#if defined(KDFAST_X86)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

}  // namespace kdfast::cache
