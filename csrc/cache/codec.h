// Blocks: the targets of up to 256 tokens as bytes, and back (FORMAT.md, section 6); compact ones in compact/compact.h.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kdfast::cache {

// Numbers as they stand in a frame.
enum class Codec : std::uint8_t { fixed = 1, compact = 2, drawn = 3 };
enum class Method : std::uint8_t { topk, topp, sample, pps };
inline constexpr std::array<std::string_view, 4> method_names = {"topk", "topp", "sample", "pps"};

// What the bytes of a frame's blocks depend on, besides themselves.
struct Layout {
    Codec codec = Codec::fixed;
    Method method = Method::topk;
    std::uint32_t vocab_size = 0;
    std::uint32_t kept = 0;  // K
    std::uint32_t grid = 4;  // a step is 2^-grid nats
    double draws = 0;        // N of sample, whole, 1 to 2^24
    bool ragged = false;     // tokens have a k_eff of their own
    bool gold = false;
    std::vector<double> temperatures;  // captured, other than 1, ascending

    unsigned id_bits() const { return vocab_size <= 2 ? 1 : static_cast<unsigned>(std::bit_width(vocab_size - 1)); }
};

// Targets of some tokens in memory, one row of K entries a token; a pointer is null where a layout has no such field,
// and in a destination also where a field of one number a token is not wanted. A row's entries from k_eff on hold id
// -1, logprob -inf and mass 0 when decoded, and are not looked at when encoded.
template <class Id, class Float>
struct Targets {
    std::int64_t tokens = 0;
    Id* ids = nullptr;            // (tokens, K)
    Float* logprobs = nullptr;    // (tokens, K): fixed and compact
    Float* mass = nullptr;        // (tokens, K): drawn
    Float* lse = nullptr;         // (temperatures other than 1, lse_stride)
    std::int64_t lse_stride = 0;  // of one temperature to the next, >= tokens
    Id* k_eff = nullptr;          // (tokens); not looked at when encoding a layout that is not ragged; K each when such
                                  // a one is decoded
    Float* gold = nullptr;        // (tokens)
    Float* neg_entropy = nullptr;  // (tokens): drawn

    // Some of the tokens.
    Targets rows(std::int64_t first, std::int64_t count, std::int64_t kept) const {
        const auto from = [](auto* p, std::int64_t n) { return p ? p + n : p; };
        return {.tokens = count,
                .ids = from(ids, first * kept),
                .logprobs = from(logprobs, first * kept),
                .mass = from(mass, first * kept),
                .lse = from(lse, first),
                .lse_stride = lse_stride,
                .k_eff = from(k_eff, first),
                .gold = from(gold, first),
                .neg_entropy = from(neg_entropy, first)};
    }
};
using Source = Targets<const std::int32_t, const float>;
using Destination = Targets<std::int32_t, float>;
inline Source source_of(const Destination& d) {
    return {.tokens = d.tokens,
            .ids = d.ids,
            .logprobs = d.logprobs,
            .mass = d.mass,
            .lse = d.lse,
            .lse_stride = d.lse_stride,
            .k_eff = d.k_eff,
            .gold = d.gold,
            .neg_entropy = d.neg_entropy};
}

inline constexpr std::size_t padding_after_block = 64;  // bytes behind a block that a decoder may load, never use

// The tokens [first, first + out.tokens) of a block of `tokens`, which is followed by padding_after_block bytes that
// may be loaded.
struct DecodeRequest {
    std::span<const std::byte> block;
    std::int64_t tokens = 0;
    std::int64_t first = 0;
    Destination out;
};

// Throws ArgumentError for values that the format cannot hold, naming the token: ids out of range or twice,
// log-probabilities that are not finite or above 0 and so on; and for a layout outside the limits. Any number of
// tokens.
void check(const Layout& layout, const Source& targets);

// Appends one block of targets that have been checked. The entries of a row may come in any order.
void encode(const Layout& layout, const Source& targets, std::vector<std::byte>& out);

// The checksum of the block has been verified by the caller, which does not make its contents legal: throws Fault
// (corrupt) for what FORMAT.md forbids, in any of its tokens' lengths or in the tokens asked for, whose `out` then
// holds anything; what entries are to each other rows/prove.h looks at. A layout outside the limits, which whoever read
// it has checked, and tokens that are not there are ArgumentErrors. Of a fixed block without `out.ids` only the fields
// of one number a token are read.
void decode(const Layout& layout, const DecodeRequest& request);

}  // namespace kdfast::cache
