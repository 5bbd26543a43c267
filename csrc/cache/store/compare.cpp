#include "cache/store/compare.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cache/store/scratch.h"

namespace kdfast::cache {
namespace {

constexpr std::int64_t most_tokens_at_once = 256;  // those of a block at most

// But for the last bits of an f32, as what was read and is written again may differ by: of `unit`, 1 for logarithms, or
// of what is larger.
bool same_numbers(const float* a, const float* b, std::int64_t count, float unit) {
    for (std::int64_t i = 0; i < count; ++i)
        if (a[i] != b[i] && !(std::abs(a[i] - b[i]) <= 0x1p-21f * std::max(unit, std::abs(a[i])))) return false;
    return true;
}

// Entries of a token, of which those of equal probability may stand in any order.
bool same_entries(const std::int32_t* ids, const float* values, const std::int32_t* other_ids, const float* others,
                  std::int64_t k, float unit) {
    if (!same_numbers(values, others, k, unit)) return false;
    std::vector<std::int32_t> a, b;
    for (std::int64_t from = 0, to = 0; from < k; from = to) {
        while (to < k && values[to] == values[from]) ++to;
        if (std::equal(ids + from, ids + to, other_ids + from)) continue;
        a.assign(ids + from, ids + to);
        b.assign(other_ids + from, other_ids + to);
        std::ranges::sort(a);
        std::ranges::sort(b);
        if (a != b) return false;
    }
    return true;
}

// Rows of as many tokens, as decoding left them.
bool same_rows(const Layout& a, const Destination& x, const Layout& b, const Destination& y) {
    const bool drawn = a.codec == Codec::drawn;
    const float *values = drawn ? x.mass : x.logprobs, *others = drawn ? y.mass : y.logprobs;
    for (std::int64_t i = 0; i < x.tokens; ++i) {
        const std::int64_t k = a.ragged ? x.k_eff[i] : a.kept, at = i * a.kept, other = i * b.kept;
        if (k != (b.ragged ? y.k_eff[i] : b.kept) ||
            !same_entries(x.ids + at, values + at, y.ids + other, others + other, k, drawn ? 0 : 1))
            return false;
    }
    for (std::size_t t = 0; t < a.temperatures.size(); ++t) {
        const auto row = static_cast<std::int64_t>(t);
        if (!same_numbers(x.lse + row * x.lse_stride, y.lse + row * y.lse_stride, x.tokens, 1)) return false;
    }
    return (!a.gold || same_numbers(x.gold, y.gold, x.tokens, 1)) &&
           (!drawn || same_numbers(x.neg_entropy, y.neg_entropy, x.tokens, 1));
}

// What rows are compared by, beside their values.
bool same_kind(const Layout& a, const Layout& b) {
    return a.method == b.method && a.gold == b.gold && a.temperatures == b.temperatures;
}

class Stored {
  public:
    Stored(const Reader& reader, const Place& place)
        : reader_(reader), place_(place), layout_(reader.header(place).layout(reader.catalog().header())) {}
    const Layout& layout() const { return layout_; }
    std::int64_t tokens() const { return place_.entry.tokens; }
    Destination rows(std::int64_t first, std::int64_t count) {
        const Destination out = scratch_.rows(layout_, count);
        reader_.read(ReadRequest{&place_, first, out});
        return out;
    }

  private:
    const Reader& reader_;
    const Place place_;
    Layout layout_;
    Scratch scratch_;
};

// Targets in memory as they come back from a block.
class Given {
  public:
    Given(Layout layout, const Source& targets) : layout_(std::move(layout)), targets_(targets) {
        if (layout_.codec == Codec::compact) layout_.codec = Codec::fixed;  // which hold the same numbers
    }
    const Layout& layout() const { return layout_; }
    std::int64_t tokens() const { return targets_.tokens; }
    Destination rows(std::int64_t first, std::int64_t count) {
        block_.clear();
        encode(layout_, targets_.rows(first, count, layout_.kept), block_);
        const std::size_t size = block_.size();
        block_.resize(size + padding_after_block);
        const Destination out = scratch_.rows(layout_, count);
        decode(layout_, {std::span(block_).first(size), count, 0, out});
        return out;
    }

  private:
    Layout layout_;
    Source targets_;
    std::vector<std::byte> block_;
    Scratch scratch_;
};

template <class A, class B>
bool same(A a, B b) {
    if (!same_kind(a.layout(), b.layout()) || a.tokens() != b.tokens()) return false;
    for (std::int64_t first = 0; first < a.tokens(); first += most_tokens_at_once) {
        const std::int64_t count = std::min(most_tokens_at_once, a.tokens() - first);
        if (!same_rows(a.layout(), a.rows(first, count), b.layout(), b.rows(first, count))) return false;
    }
    return true;
}

}  // namespace

bool same_targets(const Reader& reader, const Place& place, const Layout& layout, const Source& targets) {
    Stored stored(reader, place);
    Layout on_its_grid = layout;
    on_its_grid.grid = stored.layout().grid;
    return same(std::move(stored), Given(std::move(on_its_grid), targets));
}

bool same_targets(const Reader& reader, const Place& place, const Reader& other_reader, const Place& other) {
    return same(Stored(reader, place), Stored(other_reader, other));
}

}  // namespace kdfast::cache
