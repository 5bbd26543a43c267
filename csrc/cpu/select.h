// Sparse targets from rows of logits: what a call is, and the two functions that every ISA provides for it.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace kdfast::cpu {

// The order is that of the names below; nothing outside this file knows the numbers.
enum class Method : std::uint8_t { topk, topp, sample, pps };
inline constexpr std::array<std::string_view, 4> method_names = {"topk", "topp", "sample", "pps"};

// One call. Per row of logits x, with q_T = softmax(x / T) and L = logsumexp(x):
//   topk    the k largest columns, in order; columns of -inf never
//   topp    the least of them whose mass under q_1 reaches p, at least `least` and at most k
//   sample  k draws from q_T with replacement; mass = draws of a column / k
//   pps     column i with probability min(1, l q_T(i)), which sum to k; mass = max(q_T(i), 1 / l)
// Sampled columns are in ascending order. A row without a finite L is NaN in every output, with columns 0, 1, ...
struct SelectCall {
    std::int64_t rows = 0;
    Rows logits;
    Method method = Method::topk;
    std::int64_t k = 0;
    std::int64_t least = 0;            // topp
    double p = 1;                      // topp
    std::vector<double> temperatures;  // distinct; of a sampled method the one that it draws at
    std::uint64_t seed = 0;
    std::int64_t first_token = 0;  // number of row 0, which the random numbers go by

    std::int32_t* ids = nullptr;    // (rows, k); -1 from k_eff on
    float* logprobs = nullptr;      // (rows, k) x - L; -inf from k_eff on
    float* lse = nullptr;           // (temperatures, rows) logsumexp((x - L) / T)
    std::int32_t* k_eff = nullptr;  // (rows)
    float* mass = nullptr;          // (rows, k), sampled methods
    float* neg_entropy = nullptr;   // (rows), sampled methods: sum mass log q_T
    int threads = 1;

    bool sampled() const { return method == Method::sample || method == Method::pps; }
};

// Columns under one maximum and one set of sums: a tile is read from memory once and stays, beside the next, in the
// nearest cache.
constexpr std::int64_t select_tile(DType dtype) { return dtype == DType::f32 ? 2048 : 4096; }
// Vectors under one vector of maxima: lane l of a block of 16 vectors has the largest of its columns l, l + lanes, ...
inline constexpr std::int64_t select_block_vectors = 16;

// An exponential per column, 2^(x c - reference c), and where its sum goes; its square is the exponential at half the
// temperature. The product reference c is rounded to fp32, all else is one operation.
struct Exponential {
    float c;  // log2e / T
    std::int64_t at;
    std::int64_t squared_at;  // -1: the square is not wanted
};

struct ScanTile {
    const std::byte* data;
    DType dtype;
    std::int64_t columns;    // <= select_tile(dtype)
    const std::byte* ahead;  // what will be read next, to be fetched meanwhile; as many bytes as a tile, or null

    const Exponential* exponentials;
    std::int64_t exponentials_count;

    float* maxima;      // (blocks, lanes)
    float* max;         // of the tile; NaN is not seen by a maximum
    float* reference;   // of the exponentials
    float* sums;        // of exponentials; NaN is seen
    float* block_sums;  // of the first exponential, (blocks); null: not wanted
};

// A column as a number that is less the earlier it comes in the order: larger logits first, then lower ids. Inlined
// always: a copy outside an instruction set's namespace would be shared between them.
using Key = std::uint64_t;
[[gnu::always_inline]] inline Key key_of(float x, std::int64_t id) {
    const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);  // -0 and 0 are a tie
    const std::uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return Key{~ascending} << 32 | static_cast<std::uint32_t>(id);
}

// The columns above a floor, block by block for as long as there is room for all columns of the next.
struct Collection {
    const std::byte* row;
    DType dtype;
    std::int64_t columns;
    const float* maxima;  // (blocks, lanes)
    float floor;
    Key* keys;
    std::int64_t room;
    std::int64_t block = 0;  // the next
    std::int64_t count = 0;  // of keys
};

struct SelectKernels {
    std::int64_t lanes;
    void (*scan)(const ScanTile&);
    // A number above which there are at least k columns of the row, if it has as many above -inf, and few more than k;
    // bins is scratch as large as maxima, (blocks, lanes).
    float (*floor_of)(const float* maxima, std::int64_t blocks, std::int64_t k, float* bins);
    void (*collect)(Collection&);
    // The exponentials of any number of columns.
    void (*weights)(const std::byte* x, DType dtype, std::int64_t n, float reference, float c, float* out);

    std::int64_t block() const { return lanes * select_block_vectors; }  // columns
};

extern const SelectKernels generic_select;
#if defined(KDFAST_X86)
extern const SelectKernels avx2_select;
extern const SelectKernels avx512_select;
extern const SelectKernels avx512_bf16_select;
#endif

// Throws ArgumentError for a call that cannot be meant.
void select(const SelectCall& call, const SelectKernels& kernels);

}  // namespace kdfast::cpu
