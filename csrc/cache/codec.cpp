#include "cache/codec.h"

#include <cmath>
#include <string>

#include "cache/rows/check.h"
#include "cache/rows/drawn.h"
#include "cache/rows/fixed.h"
#include "core/error.h"

namespace kdfast::cache {
namespace {

// The limits that both directions rely on; those of a frame are its reader's business.
void check_layout(const Layout& layout) {
    const auto demand = [](bool holds, const char* what) {
        if (!holds) throw ArgumentError(what);
    };
    demand(layout.vocab_size >= 1 && layout.vocab_size <= 1u << 24, "vocab_size must be 1 to 2^24");
    demand(layout.kept >= 1 && layout.kept <= 65535, "K must be 1 to 65535");
    demand(layout.grid >= 2 && layout.grid <= 10, "grid must be 2 to 10");
    const bool sampled = layout.method == Method::sample || layout.method == Method::pps;
    demand((layout.codec == Codec::drawn) == sampled, "codec and method do not go together");
    demand(layout.method != Method::sample ||
               (layout.draws >= 1 && layout.draws <= 1 << 24 && layout.draws == std::floor(layout.draws)),
           "the number of draws must be a whole number from 1 to 2^24");
}

void check_limits(const Layout& layout, std::int64_t tokens) {
    if (tokens < 1 || tokens > 256) throw ArgumentError("a block has 1 to 256 tokens");
    check_layout(layout);
}

}  // namespace

void check(const Layout& layout, const Source& targets) {
    check_layout(layout);
    if (targets.tokens == 0) return;
    layout.codec == Codec::drawn ? check_drawn(layout, targets) : check_fixed(layout, targets);
}

void encode(const Layout& layout, const Source& targets, std::vector<std::byte>& out) {
    check_limits(layout, targets.tokens);
    const std::size_t before = out.size();
    try {
        switch (layout.codec) {
            case Codec::fixed:
                encode_fixed(layout, targets, out);
                break;
            case Codec::drawn:
                encode_drawn(layout, targets, out);
                break;
            case Codec::compact:
                throw ArgumentError("a compact block is made from a fixed one, with a model");
        }
    } catch (...) {
        out.resize(before);
        throw;
    }
    out.resize(before + (out.size() - before + 7) / 8 * 8);
}

void decode(const Layout& layout, const DecodeRequest& request) {
    const auto& [block, tokens, first, out] = request;
    check_limits(layout, tokens);
    if (first < 0 || out.tokens < 0 || out.tokens > tokens - first)
        throw ArgumentError("tokens " + std::to_string(first) + " to " + std::to_string(first + out.tokens) +
                            " of a block of " + std::to_string(tokens));
    switch (layout.codec) {
        case Codec::fixed:
            return decode_fixed(layout, block, tokens, first, out);
        case Codec::drawn:
            return decode_drawn(layout, block, tokens, first, out);
        case Codec::compact:
            throw ArgumentError("a compact block is decoded with its model");
    }
}

}  // namespace kdfast::cache
