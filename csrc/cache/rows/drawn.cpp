#include "cache/rows/drawn.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "cache/bit_stream.h"
#include "cache/rows/fields.h"

namespace kdfast::cache {
namespace {

constexpr unsigned largest_order = 23;
constexpr std::uint32_t value_limit = 1 << 24;

struct Entry {
    std::uint32_t gap, value;
};

// Bits of a number in the exponential Golomb code.
std::uint64_t golomb_bits(std::uint32_t w, unsigned order) {
    return 2 * static_cast<unsigned>(std::bit_width((w >> order) + 1)) - 1 + order;
}

void put_golomb(BitWriter& stream, std::uint32_t w, unsigned order) {
    const auto low = [](std::uint32_t x, unsigned bits) { return x & ((1u << bits) - 1); };
    const std::uint32_t h = (w >> order) + 1;
    const auto b = static_cast<unsigned>(std::bit_width(h)) - 1;
    stream.unary(b);
    stream.bits(low(h, b), b);
    stream.bits(low(w, order), order);
}

std::uint64_t get_golomb(BitReader& stream, unsigned order) {
    const auto b = static_cast<unsigned>(stream.unary(24));
    const std::uint64_t low = stream.bits(b + order);
    return (((std::uint64_t{1} << b) - 1 + (low & ((std::uint64_t{1} << b) - 1))) << order) | low >> b;
}

// The order with the fewest bits in all; the least of those.
template <class Bits>
unsigned cheapest(const std::vector<Entry>& entries, Bits bits_of) {
    unsigned best = 0;
    std::uint64_t fewest = UINT64_MAX;
    for (unsigned order = 0; order <= largest_order; ++order) {
        std::uint64_t bits = 0;
        for (const Entry& entry : entries) bits += bits_of(entry, order);
        if (bits < fewest) {
            fewest = bits;
            best = order;
        }
    }
    return best;
}

// The entries of a block.
class Encoder {
  public:
    Encoder(const Layout& layout, const Source& targets)
        : layout_(layout),
          t_(targets),
          widths_(layout, targets),
          scale_(std::ldexp(1.0, static_cast<int>(layout.grid))) {}

    void run(std::vector<std::byte>& out) {
        for (std::int64_t i = 0; i < t_.tokens; ++i) take(i);
        for (std::int64_t i = 0; i < t_.tokens; ++i) append(out, t_.neg_entropy[i]);
        for (std::size_t t = 0; t < layout_.temperatures.size(); ++t)
            for (std::int64_t i = 0; i < t_.tokens; ++i)
                append(out, t_.lse[static_cast<std::int64_t>(t) * t_.lse_stride + i]);
        for (const float step : steps_) append(out, step);
        if (layout_.gold) append_gold(t_, out);
        if (layout_.ragged)
            for (std::int64_t i = 0; i < t_.tokens; ++i)
                layout_.kept <= 255 ? append(out, static_cast<std::uint8_t>(widths_[i]))
                                    : append(out, static_cast<std::uint16_t>(widths_[i]));
        write(out);
    }

  private:
    void take(std::int64_t i) {
        const std::int64_t k = widths_[i];
        const std::int32_t* ids = t_.ids + i * layout_.kept;
        const float* mass = t_.mass + i * layout_.kept;
        order_.resize(static_cast<std::size_t>(k));
        std::iota(order_.begin(), order_.end(), 0);
        const auto less = [&](std::int32_t a, std::int32_t b) { return ids[a] < ids[b]; };
        if (!std::is_sorted(order_.begin(), order_.end(), less)) std::sort(order_.begin(), order_.end(), less);
        if (layout_.method == Method::pps) steps_.push_back(k > 0 ? *std::min_element(mass, mass + k) : 0);
        std::int32_t previous = -1;
        for (const std::int32_t j : order_) {
            const double value = layout_.method == Method::sample
                                     ? std::nearbyint(mass[j] * layout_.draws) - 1
                                     : std::nearbyint(std::log(double{mass[j]} / steps_.back()) * scale_);
            entries_.push_back({static_cast<std::uint32_t>(ids[j] - previous - 1), static_cast<std::uint32_t>(value)});
            previous = ids[j];
        }
    }

    void write(std::vector<std::byte>& out) const {
        const unsigned gap_order =
            cheapest(entries_, [](const Entry& e, unsigned order) { return golomb_bits(e.gap, order); });
        const unsigned value_order = cheapest(entries_, [](const Entry& e, unsigned order) {
            return e.value == 0 ? 0 : golomb_bits(e.value - 1, order);
        });
        out.push_back(static_cast<std::byte>(gap_order));
        out.push_back(static_cast<std::byte>(value_order));
        BitWriter stream(out);
        for (const Entry& e : entries_) {
            put_golomb(stream, e.gap, gap_order);
            stream.bits(e.value != 0, 1);
            if (e.value != 0) put_golomb(stream, e.value - 1, value_order);
        }
        stream.finish();
    }

    const Layout& layout_;
    const Source& t_;
    Widths widths_;
    double scale_;
    std::vector<float> steps_;
    std::vector<Entry> entries_;
    std::vector<std::int32_t> order_;
};

}  // namespace

void encode_drawn(const Layout& layout, const Source& targets, std::vector<std::byte>& out) {
    Encoder(layout, targets).run(out);
}

void decode_drawn(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
                  const Destination& out) {
    const bool pps = layout.method == Method::pps;
    Sections sections(block);
    read_floats(sections.take(4 * tokens, "neg_entropy"), first, out.tokens, out.neg_entropy, "neg_entropy",
                finite_log);
    read_lse(layout, sections, tokens, first, out);
    const std::byte* steps = pps ? sections.take(4 * tokens, "step") : nullptr;
    if (layout.gold) read_gold(sections.take(4 * tokens, "gold"), first, out);
    const Widths widths(layout, sections, tokens, layout.kept <= 255);
    fill_k_eff(widths, first, out);
    const std::byte* orders = sections.take(2, "orders");
    const auto gap_order = std::to_integer<unsigned>(orders[0]), value_order = std::to_integer<unsigned>(orders[1]);
    if (gap_order > largest_order || value_order > largest_order) corrupt("a block's codes have an order above 23");

    // Where a token's bits begin only those before it say, and where the stream ends only all of them.
    const double grid = std::ldexp(1.0, -static_cast<int>(layout.grid));
    BitReader stream(sections.rest());
    for (std::int64_t i = 0; i < tokens; ++i) {
        const std::int64_t k = widths[i], row = (i - first) * layout.kept;
        const bool wanted = i >= first && i < first + out.tokens;
        const float step = pps && wanted ? load<float>(steps + 4 * i) : 0;
        if (pps && wanted && !(k == 0 ? std::bit_cast<std::uint32_t>(step) == 0 : step > 0 && finite(step)))
            corrupt("a block has a step of " + std::to_string(step));
        std::uint64_t next = 0, drawn = 0;
        for (std::int64_t j = 0; j < k; ++j) {
            const std::uint64_t id = next + get_golomb(stream, gap_order);
            if (id >= layout.vocab_size)
                corrupt("token " + std::to_string(i) + " of a block has an id that is not below " +
                        std::to_string(layout.vocab_size));
            next = id + 1;
            const std::uint64_t value = stream.bits(1) ? get_golomb(stream, value_order) + 1 : 0;
            const auto number = static_cast<double>(value);
            drawn += value + 1;
            if (value >= value_limit || (pps ? number * grid > most_nats : static_cast<double>(drawn) > layout.draws))
                corrupt("token " + std::to_string(i) + " of a block has a value that is too large");
            if (!wanted) continue;
            const double mass = !pps ? (number + 1) / layout.draws : value == 0 ? step : step * std::exp(number * grid);
            if (!finite(static_cast<float>(mass)))
                corrupt("token " + std::to_string(i) + " of a block has a mass that is not finite");
            out.ids[row + j] = static_cast<std::int32_t>(id);
            out.mass[row + j] = static_cast<float>(mass);
        }
        if (!wanted) continue;
        std::fill(out.ids + row + k, out.ids + row + layout.kept, -1);
        std::fill(out.mass + row + k, out.mass + row + layout.kept, 0.0f);
    }
    check_padding(stream.finish(), block);
}

}  // namespace kdfast::cache
