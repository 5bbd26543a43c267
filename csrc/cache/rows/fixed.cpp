#include "cache/rows/fixed.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cache/kernels.h"
#include "cache/rows/fields.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
namespace {

// The rows of a block, one after the other, into sections of their own.
class Encoder {
  public:
    Encoder(const Layout& layout, const Source& targets)
        : layout_(layout),
          t_(targets),
          widths_(layout, targets),
          kernels_(*cpu::kernels().cache),
          scale_(std::ldexp(1.0, static_cast<int>(layout.grid))),
          step_(1 / scale_),
          has_two_(std::ranges::find(layout.temperatures, 2.0) != layout.temperatures.end()),
          true_((layout.kept + 7u) / 8u * 8u),
          rounded_(true_.size()),
          tops_(static_cast<std::size_t>(t_.tokens)),
          lses_(layout.temperatures.size() * tops_.size()) {
        std::int64_t bytes = 0;
        for (std::int64_t i = 0; i < t_.tokens; ++i) {
            bytes += id_bytes(widths_[i], layout.id_bits()) + delta_bytes(widths_[i]);
            ids_bytes_ += id_bytes(widths_[i], layout.id_bits());
        }
        rows_.resize(static_cast<std::size_t>(bytes));
    }

    void run(std::vector<std::byte>& out) {
        std::byte *ids = rows_.data(), *deltas = ids + ids_bytes_;
        for (std::int64_t i = 0; i < t_.tokens; ++i) {
            const std::int64_t k = widths_[i];
            take(i, k);
            ids = write_ids(ids, k);
            move(i, k);
            write_deltas(deltas, k);
            deltas += delta_bytes(k);
        }
        const auto bytes = [&out](const void* from, std::size_t count) {
            const auto* p = static_cast<const std::byte*>(from);
            out.insert(out.end(), p, p + count);
        };
        bytes(tops_.data(), tops_.size() * sizeof(float));
        bytes(lses_.data(), lses_.size() * sizeof(float));
        if (layout_.gold) append_gold(t_, out);
        if (widths_.data()) bytes(widths_.data(), tops_.size() * sizeof(std::uint16_t));
        bytes(rows_.data(), rows_.size());
        bytes(escapes_.data(), escapes_.size());
    }

  private:
    // Token i's entries in order: ids_, true_ and rounded_ logarithms relative to entry 0, steps_.
    void take(std::int64_t i, std::int64_t k) {
        const std::int32_t* ids = t_.ids + i * layout_.kept;
        const float* logprobs = t_.logprobs + i * layout_.kept;
        // Without a branch on an entry, which a compiler could not make wide.
        unsigned unsorted = 0;
        for (std::int64_t j = 1; j < k; ++j)
            unsorted |= !(logprobs[j - 1] > logprobs[j]) & !((logprobs[j - 1] == logprobs[j]) & (ids[j - 1] < ids[j]));
        if (unsorted != 0) {
            order_.resize(static_cast<std::size_t>(k));
            std::iota(order_.begin(), order_.end(), 0);
            std::sort(order_.begin(), order_.end(), [&](std::int32_t a, std::int32_t b) {
                return logprobs[a] != logprobs[b] ? logprobs[a] > logprobs[b] : ids[a] < ids[b];
            });
            sorted_ids_.clear();
            sorted_logprobs_.clear();
            for (const std::int32_t j : order_) {
                sorted_ids_.push_back(ids[j]);
                sorted_logprobs_.push_back(logprobs[j]);
            }
            ids = sorted_ids_.data();
            logprobs = sorted_logprobs_.data();
        }
        ids_ = ids;
        logprobs_ = logprobs;
    }

    std::byte* write_ids(std::byte* at, std::int64_t k) {
        const unsigned bits = layout_.id_bits();
        std::uint64_t pending = 0;
        unsigned filled = 0;
        for (std::int64_t j = 0; j < k; ++j) {
            pending |= static_cast<std::uint64_t>(ids_[j]) << filled;
            filled += bits;
            if (filled >= 32) {
                store(at, static_cast<std::uint32_t>(pending));
                at += 4;
                pending >>= 32;
                filled -= 32;
            }
        }
        for (; filled > 0; filled -= std::min(filled, 8u), pending >>= 8) *at++ = static_cast<std::byte>(pending & 255);
        return at;
    }

    // Rounds, and moves top and every lse by what the rounding does to the kept mass.
    void move(std::int64_t i, std::int64_t k) {
        const auto row = static_cast<std::size_t>(i);
        const double top = k > 0 ? logprobs_[0] : 0;
        steps_.resize(static_cast<std::size_t>(k));
        constexpr double shift = 0x1.8p52;  // leaves no room for a fraction
        for (std::size_t j = 0; j < steps_.size(); ++j) {
            true_[j] = logprobs_[j] - top;
            const double steps = (-true_[j] * scale_ + shift) - shift;
            steps_[j] = static_cast<std::int32_t>(steps);
            rounded_[j] = -steps * step_;
        }
        const std::size_t padded = (steps_.size() + 7) / 8 * 8;
        std::fill(true_.begin() + k, true_.begin() + static_cast<std::ptrdiff_t>(padded), absent);
        std::fill(rounded_.begin() + k, rounded_.begin() + static_cast<std::ptrdiff_t>(padded), absent);
        const auto count = static_cast<std::int64_t>(padded);
        double sums[4] = {1, 1, 1, 1}, two[4] = {1, 1, 1, 1};
        const auto sum_at = [&](double inverse, double* to) {
            if (k > 0) kernels_.exponential_sums(true_.data(), rounded_.data(), count, inverse, to);
        };
        // e^x is the square of e^(x / 2), which is what temperature 2 asks for.
        sum_at(has_two_ ? 0.5 : 1.0, has_two_ ? two : sums);
        const double* one = has_two_ ? two + 2 : sums;
        tops_[row] = static_cast<float>(std::min(top + std::log1p((one[0] - one[1]) / one[1]), 0.0));
        for (std::size_t t = 0; t < layout_.temperatures.size(); ++t) {
            const double inverse = 1 / layout_.temperatures[t];
            const float lse = t_.lse[static_cast<std::int64_t>(t) * t_.lse_stride + i];
            const bool known = layout_.temperatures[t] == 2;
            if (!known) sum_at(inverse, sums);
            const double* at = known ? two : sums;
            const double moved = lse + (tops_[row] - top) * inverse + std::log1p((at[1] - at[0]) / at[0]);
            lses_[t * tops_.size() + row] = static_cast<float>(moved);
        }
    }

    void write_deltas(std::byte* nibbles, std::int64_t k) {
        const auto nibble = [&](std::int64_t j) {
            const auto at = static_cast<std::size_t>(j);
            const auto delta = static_cast<std::uint32_t>(steps_[at] - steps_[at - 1]);
            if (delta < delta_escaped) return delta;
            if (delta < least_long_delta) {
                escapes_.push_back(static_cast<std::byte>(delta - delta_escaped));
            } else {
                escapes_.push_back(static_cast<std::byte>(escape_escaped));
                append(escapes_, delta);
            }
            return delta_escaped;
        };
        std::int64_t j = 1;
        for (; j + 1 < k; j += 2) {
            const std::uint32_t low = nibble(j);
            *nibbles++ = static_cast<std::byte>(low | nibble(j + 1) << 4);
        }
        if (j < k) *nibbles = static_cast<std::byte>(nibble(j));
    }

    static constexpr double absent = -std::numeric_limits<double>::max();  // the logarithm of nothing

    const Layout& layout_;
    const Source& t_;
    Widths widths_;
    const Kernels& kernels_;
    double scale_, step_;  // steps in a nat, nats in a step
    bool has_two_;         // whether temperature 2 is captured
    std::vector<double> true_, rounded_;
    std::vector<float> tops_, lses_;
    std::int64_t ids_bytes_ = 0;
    std::vector<std::byte> rows_, escapes_;  // ids and deltas; escapes

    // Of the present token.
    const std::int32_t* ids_ = nullptr;
    const float* logprobs_ = nullptr;
    std::vector<std::int32_t> steps_;
    std::vector<std::int32_t> order_, sorted_ids_;
    std::vector<float> sorted_logprobs_;
};

// Bytes of a block's ids and deltas before the first token asked for, before the last one's end, and of all.
struct Extents {
    std::int64_t ids[3] = {}, deltas[3] = {};

    Extents(std::int64_t k, std::int64_t tokens, std::int64_t first, std::int64_t last, unsigned bits)
        : ids{first * id_bytes(k, bits), last * id_bytes(k, bits), tokens * id_bytes(k, bits)},
          deltas{first * delta_bytes(k), last * delta_bytes(k), tokens * delta_bytes(k)} {}
    Extents(const Widths& widths, std::int64_t tokens, std::int64_t first, std::int64_t last, unsigned bits) {
        for (std::int64_t i = 0; i < tokens; ++i)
            for (int end = i < first ? 0 : i < last ? 1 : 2; end < 3; ++end) {
                ids[end] += id_bytes(widths[i], bits);
                deltas[end] += delta_bytes(widths[i]);
            }
    }
};

// The bits behind a row's fields, which are zero: of ids those of the tokens asked for, of deltas those of all, as an
// unused nibble of any token would count as an escape. Without a branch on a token, which costs as much as its
// decoding. `ids` are those of token `first`.
template <class WidthOf>
void check_rests(const std::byte* ids, const std::byte* deltas, std::int64_t tokens, std::int64_t first,
                 std::int64_t last, unsigned bits, WidthOf width_of) {
    unsigned behind_deltas = 0, behind_ids = 0;
    for (std::int64_t i = 0; i < tokens; ++i) {
        const std::int64_t k = width_of(i);
        deltas += delta_bytes(k);
        if (k > 0 && k % 2 == 0) behind_deltas |= std::to_integer<unsigned>(deltas[-1]) >> 4;
    }
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t k = width_of(i);
        ids += id_bytes(k, bits);
        const auto used = static_cast<unsigned>(k * bits % 8);
        if (used != 0) behind_ids |= std::to_integer<unsigned>(ids[-1]) >> used;
    }
    if (behind_deltas != 0) corrupt("the bits behind a token's deltas are not zero");
    if (behind_ids != 0) corrupt("the bits behind a token's ids are not zero");
}

// The largest log-probability of each token, of which one without entries has none.
void check_tops(const std::byte* tops, const Widths& widths, std::int64_t first, std::int64_t last) {
    read_floats(tops, first, last - first, nullptr, "top", finite_log);
    if (!widths.data()) return;
    for (std::int64_t i = first; i < last; ++i)
        if (widths[i] == 0 && load<std::uint32_t>(tops + 4 * i) != 0)
            corrupt("a block has a top of " + std::to_string(load<float>(tops + 4 * i)) + " for a token of no entries");
}

}  // namespace

const std::byte* skip_escapes(const std::byte* at, const std::byte* end, std::int64_t count) {
    while (count > 0) {
        if (end - at < count) corrupt("a block ends within its escapes");
        if (count <= 8) {  // those of a token, most of which are short: a call would take longer
            const std::byte* const last = at + count;
            while (at < last && *at != std::byte{escape_escaped}) ++at;
            if (at == last) return at;
            count = last - at;
        }
        const void* found = std::memchr(at, escape_escaped, static_cast<std::size_t>(count));
        if (!found) return at + count;
        const auto* escape = static_cast<const std::byte*>(found);
        count -= escape - at + 1;
        if (end - escape < 5) corrupt("a block ends within its escapes");
        if (load<std::uint32_t>(escape + 1) < least_long_delta) corrupt("a delta is escaped without need");
        at = escape + 5;
    }
    return at;
}

void encode_fixed(const Layout& layout, const Source& targets, std::vector<std::byte>& out) {
    Encoder(layout, targets).run(out);
}

void decode_fixed(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
                  const Destination& out) {
    Sections sections(block);
    const std::byte* tops = sections.take(4 * tokens, "top");
    read_lse(layout, sections, tokens, first, out);
    if (layout.gold) read_gold(sections.take(4 * tokens, "gold"), first, out);
    const Widths widths(layout, sections, tokens, false);
    fill_k_eff(widths, first, out);
    if (!out.ids) return;

    const unsigned bits = layout.id_bits();
    const std::int64_t last = first + out.tokens;
    const Extents extents =
        widths.data() ? Extents(widths, tokens, first, last, bits) : Extents(layout.kept, tokens, first, last, bits);
    const std::byte* ids = sections.take(extents.ids[2], "ids");
    const std::byte* deltas = sections.take(extents.deltas[2], "deltas");
    const std::span<const std::byte> escapes = sections.rest();
    const std::byte* first_ids = ids + extents.ids[0];
    if (widths.data())
        check_rests(first_ids, deltas, tokens, first, last, bits, [&](std::int64_t i) { return widths[i]; });
    else
        check_rests(first_ids, deltas, tokens, first, last, bits,
                    [k = layout.kept](std::int64_t) { return std::int64_t{k}; });
    check_tops(tops, widths, first, last);

    const Kernels& kernels = *cpu::kernels().cache;
    FixedRows rows;
    rows.rows = out.tokens;
    rows.kept = layout.kept;
    rows.k_eff = widths.data() ? widths.data() + first : nullptr;
    rows.id_bits = bits;
    rows.vocab_size = layout.vocab_size;
    rows.step = std::ldexp(1.0f, -static_cast<int>(layout.grid));
    rows.tops = tops + 4 * first;
    rows.ids = first_ids;
    rows.deltas = deltas + extents.deltas[0];
    rows.escapes_end = escapes.data() + escapes.size();
    rows.escapes = skip_escapes(escapes.data(), rows.escapes_end, kernels.count_escapes(deltas, extents.deltas[0]));
    rows.out_ids = out.ids;
    rows.out_logprobs = out.logprobs;
    switch (kernels.decode_fixed(rows)) {
        case Broken::none:
            break;
        case Broken::id:
            corrupt("token " + std::to_string(first + rows.row) + " of a block has an id that is not below " +
                    std::to_string(layout.vocab_size));
        case Broken::words:
        case Broken::escapes:
            corrupt("token " + std::to_string(first + rows.row) + " of a block has escapes that are missing or wrong");
        case Broken::steps:
            corrupt("token " + std::to_string(first + rows.row) + " of a block has deltas of 2^24 steps or more");
    }
    const std::int64_t behind =
        kernels.count_escapes(deltas + extents.deltas[1], extents.deltas[2] - extents.deltas[1]);
    check_padding(skip_escapes(rows.escapes, rows.escapes_end, behind), block);
}

}  // namespace kdfast::cache
