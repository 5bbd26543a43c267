#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "cache/compact/compact.h"
#include "cache/compact/lanes.h"
#include "core/error.h"

namespace kdfast::cache {
namespace {

constexpr std::size_t classes_per_vector = 8;
constexpr double cost_unit = 16;  // parts of a bit; 600 at most for an id

double bits_of(const Symbol& symbol, unsigned total) {
    return total - std::log2(static_cast<double>(symbol.frequency)) + symbol.raw;
}

std::vector<EncodedSymbol> encoded(const Alphabet& alphabet) {
    std::vector<EncodedSymbol> symbols;
    std::uint32_t start = 0;
    for (const Symbol& symbol : alphabet) {
        symbols.push_back({symbol.base, symbol.frequency, static_cast<std::uint16_t>(start), symbol.raw});
        start += symbol.frequency;
    }
    return symbols;
}

// The cheapest symbol that holds all values from `base` to base + 2^bits.
std::uint16_t escape_of(const Alphabet& alphabet, std::uint32_t base, unsigned bits) {
    std::size_t found = alphabet.size();
    for (std::size_t j = 0; j < alphabet.size(); ++j)
        if (alphabet[j].base == base && alphabet[j].raw == bits &&
            (found == alphabet.size() || alphabet[j].frequency > alphabet[found].frequency))
            found = j;
    if (found == alphabet.size()) throw ArgumentError("a model in which some values have no symbol");
    return static_cast<std::uint16_t>(found);
}

// `bits` for all values, `unit` of them below the units of bases.
EncodingTable encoding_table(const Alphabet& alphabet, unsigned bits, unsigned unit = 0) {
    EncodingTable table;
    table.symbols = encoded(alphabet);
    table.escape = escape_of(alphabet, 0, bits);
    std::vector<double> best;
    for (std::size_t j = 0; j < alphabet.size(); ++j) {
        const Symbol& symbol = alphabet[j];
        const std::size_t end = symbol.base + (std::size_t{1} << symbol.raw >> unit);
        if (symbol.raw < unit || end > std::size_t{1} << 16 || symbol.raw == bits) continue;
        if (end > table.of.size()) {
            table.of.resize(end, table.escape);
            best.resize(end, bits_of(alphabet[table.escape], precision));
        }
        for (std::size_t value = symbol.base; value < end; ++value)
            if (bits_of(symbol, precision) < best[value]) {
                best[value] = bits_of(symbol, precision);
                table.of[value] = static_cast<std::uint16_t>(j);
            }
    }
    return table;
}

// Writes backwards what a decoder reads forwards.
struct Lane {
    std::uint64_t state = lane_start;
    std::vector<std::uint32_t> words;  // the last first

    void emit() {
        words.push_back(static_cast<std::uint32_t>(state));
        state >>= 32;
    }
    template <unsigned bits>
    void symbol(const EncodedSymbol& symbol) {
        if (state >> (64 - bits) >= symbol.frequency) emit();
        const std::uint64_t quotient = state / symbol.frequency;
        state = (quotient << bits) + (state - quotient * symbol.frequency) + symbol.start;
    }
    void raw(std::uint32_t value, std::uint32_t bits) {
        if (bits == 0) return;
        if (state >> (64 - bits) != 0) emit();
        state = state << bits | value;
    }
    void value(const EncodingTable& table, std::uint32_t number, unsigned unit = 0) {
        const EncodedSymbol& found = table[number >> unit];
        raw(number - (found.base << unit), found.raw);
        symbol<precision>(found);
    }
};

}  // namespace

CompactEncoder::CompactEncoder(const Model& model)
    : vocab_size_(model.vocab_size),
      listed_(static_cast<std::uint32_t>(model.listed.size())),
      classes_((model.ids.size() + classes_per_vector - 1) / classes_per_vector * classes_per_vector),
      ranks_(model.vocab_size, static_cast<std::uint16_t>(listed_)),
      costs_((listed_ + 1) * classes_),
      symbols_of_((listed_ + 1) * classes_),
      class_costs_(classes_, UINT16_MAX),
      kept_(encoding_table(model.kept, 16)),
      top_(encoding_table(model.top, 32, float_raw)),
      gold_(encoding_table(model.gold, 32, float_raw)) {
    for (std::uint32_t rank = 0; rank < listed_; ++rank) ranks_[model.listed[rank]] = static_cast<std::uint16_t>(rank);
    for (const Alphabet& alphabet : model.lse) lse_.push_back(encoding_table(alphabet, 32, float_raw));
    for (const Alphabet& alphabet : model.deltas) deltas_.push_back(encoding_table(alphabet, 24));
    class_.symbols = encoded(model.classes);
    class_.of.resize(model.ids.size());
    for (std::size_t j = 0; j < model.classes.size(); ++j)
        if (const Symbol& symbol = model.classes[j]; symbol.raw == 0) {
            class_.of[symbol.base] = static_cast<std::uint16_t>(j);
            class_costs_[symbol.base] = static_cast<std::uint16_t>(cost_unit * bits_of(symbol, precision));
        }
    if (*std::min_element(class_costs_.begin(), class_costs_.end()) == UINT16_MAX)
        throw ArgumentError("a model without a class of its own for any row");

    std::vector<double> best(listed_ + 1);
    for (std::size_t c = 0; c < model.ids.size(); ++c) {
        const Alphabet& alphabet = model.ids[c];
        ids_.push_back(encoded(alphabet));
        const std::uint16_t escape = escape_of(alphabet, listed_, model.id_bits());
        // A listed id, too, may be written as itself.
        for (std::uint32_t rank = 0; rank <= listed_; ++rank) {
            best[rank] = bits_of(alphabet[escape], id_precision);
            symbols_of_[rank * classes_ + c] = escape;
        }
        for (std::size_t j = 0; j < alphabet.size(); ++j) {
            const Symbol& symbol = alphabet[j];
            const double bits = bits_of(symbol, id_precision);
            const std::uint64_t end = std::min<std::uint64_t>(listed_, symbol.base + (std::uint64_t{1} << symbol.raw));
            for (std::uint64_t rank = symbol.base; rank < end; ++rank)
                if (bits < best[rank]) {
                    best[rank] = bits;
                    symbols_of_[rank * classes_ + c] = static_cast<std::uint16_t>(j);
                }
        }
        for (std::uint32_t rank = 0; rank <= listed_; ++rank)
            costs_[rank * classes_ + c] = static_cast<std::uint16_t>(std::lround(cost_unit * best[rank]));
    }
}

// One call of encode.
class CompactWriting {
  public:
    CompactWriting(const CompactEncoder& model, const Layout& layout, const QuantisedSource& rows)
        : model_(model), layout_(layout), rows_(rows), ranks_(layout.kept), costs_(model.classes_) {}

    void token(Lane& lane, std::int64_t token) {
        const std::uint32_t count = layout_.ragged ? rows_.k_eff[token] : layout_.kept;
        const std::uint32_t* ids = rows_.ids + token * layout_.kept;
        const std::uint32_t* steps = rows_.steps + token * layout_.kept;
        check(token, count, ids, steps);
        const std::size_t chosen = choose(ids, count);
        const std::vector<EncodedSymbol>& alphabet = model_.ids_[chosen];
        for (std::uint32_t i = count; i-- > 0;) {
            const std::uint32_t rank = ranks_[i];
            const EncodedSymbol& symbol = alphabet[model_.symbols_of_[rank * model_.classes_ + chosen]];
            const std::uint32_t value = symbol.base >= model_.listed_ ? ids[i] + model_.listed_ : rank;
            lane.raw(value - symbol.base, symbol.raw);
            lane.symbol<id_precision>(symbol);
            if (i == 0) break;
            const std::uint32_t before = i > 1 ? steps[i - 1] - steps[i - 2] : 0;
            lane.value(model_.deltas_[delta_place(i) * delta_histories + delta_history(before)],
                       steps[i] - steps[i - 1]);
        }
        if (layout_.gold) lane.value(model_.gold_, std::bit_cast<std::uint32_t>(rows_.gold[token]), float_raw);
        for (std::size_t j = model_.lse_.size(); j-- > 0;)
            lane.value(model_.lse_[j], std::bit_cast<std::uint32_t>(lse(j, token)), float_raw);
        lane.value(model_.top_, std::bit_cast<std::uint32_t>(rows_.top[token]), float_raw);
        if (layout_.ragged) lane.value(model_.kept_, count);
        lane.symbol<precision>(model_.class_.symbols[model_.class_.of[chosen]]);
    }

  private:
    float lse(std::size_t j, std::int64_t token) const {
        return rows_.lse[static_cast<std::int64_t>(j) * rows_.lse_stride + token];
    }

    void check(std::int64_t token, std::uint32_t count, const std::uint32_t* ids, const std::uint32_t* steps) const {
        const auto refuse = [&](const std::string& what) {
            throw ArgumentError("compact block, token " + std::to_string(token) + ": " + what);
        };
        if (count > layout_.kept) refuse("more entries than are kept");
        if (const float top = rows_.top[token]; !std::isfinite(top) || top > 0 || (count == 0 && top != 0))
            refuse("a top that is not finite and <= 0, or not 0 where there are no entries");
        for (std::size_t j = 0; j < model_.lse_.size(); ++j)
            if (!std::isfinite(lse(j, token))) refuse("an lse that is not finite");
        if (layout_.gold && !(rows_.gold[token] <= 0)) refuse("a gold that is not <= 0");
        if (count == 0) return;
        bool wrong = steps[0] != 0 || steps[count - 1] >> 24 != 0 || ids[0] >= layout_.vocab_size;
        for (std::uint32_t i = 1; i < count; ++i) wrong |= ids[i] >= layout_.vocab_size || steps[i] < steps[i - 1];
        if (wrong) refuse("ids outside of the vocabulary, or steps that fall, or reach 2^24");
    }

    // The class in which the row is shortest.
    std::size_t choose(const std::uint32_t* ids, std::uint32_t count) {
        for (std::uint32_t i = 0; i < count; ++i) ranks_[i] = model_.ranks_[ids[i]];
        const std::size_t classes = model_.classes_;
        for (std::size_t c = 0; c < classes; ++c) costs_[c] = model_.class_costs_[c];
        for (std::size_t c = 0; c < classes; c += classes_per_vector) {
            std::array<std::uint32_t, classes_per_vector> sum{};
            for (std::uint32_t i = 0; i < count; ++i) {
                const std::uint16_t* cost = model_.costs_.data() + ranks_[i] * classes + c;
                for (std::size_t j = 0; j < classes_per_vector; ++j) sum[j] += cost[j];
            }
            for (std::size_t j = 0; j < classes_per_vector; ++j)
                if (costs_[c + j] != UINT16_MAX) costs_[c + j] += sum[j];
        }
        std::size_t best = classes;
        for (std::size_t c = 0; c < classes; ++c)
            if (model_.class_costs_[c] != UINT16_MAX && (best == classes || costs_[c] < costs_[best])) best = c;
        return best;
    }

    const CompactEncoder& model_;
    const Layout& layout_;
    const QuantisedSource& rows_;
    std::vector<std::uint32_t> ranks_;
    std::vector<std::uint32_t> costs_;
};

void CompactEncoder::encode(const Layout& layout, const QuantisedSource& rows, std::vector<std::byte>& out) const {
    if (layout.vocab_size != vocab_size_ || layout.temperatures.size() != lse_.size())
        throw ArgumentError("a model of another vocabulary or of other temperatures");
    CompactWriting writing(*this, layout, rows);
    std::array<Lane, lanes> lane;
    const std::size_t each = static_cast<std::size_t>(rows.tokens) / lanes + 1;
    for (Lane& l : lane) l.words.reserve(each * (std::size_t{layout.kept} / 2 + 4));
    for (std::int64_t token = rows.tokens; token-- > 0;)
        writing.token(lane[static_cast<std::size_t>(token) % lanes], token);

    std::size_t size = lanes * 4;
    for (const Lane& l : lane) size += sizeof(l.state) + 4 * l.words.size();
    const std::size_t before = out.size();
    out.resize(before + (size + 7) / 8 * 8);
    std::byte* at = out.data() + before;
    const auto put = [&at](auto value) {
        std::memcpy(at, &value, sizeof(value));
        at += sizeof(value);
    };
    for (const Lane& l : lane) put(static_cast<std::uint32_t>(l.words.size()));
    for (const Lane& l : lane) {
        put(l.state);
        for (std::size_t j = l.words.size(); j-- > 0;) put(l.words[j]);
    }
}

}  // namespace kdfast::cache
