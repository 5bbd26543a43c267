#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

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

__extension__ using Wide = unsigned __int128;

constexpr std::uint8_t no_shift = 64;  // of a symbol that has no reciprocal, and is divided by

EncodedSymbol encoded(const Symbol& symbol, std::uint32_t start, unsigned bits) {
    const std::uint64_t f = symbol.frequency;
    EncodedSymbol made;
    made.most = (f << (64 - bits)) - 1;  // of 2^bits, all
    made.base = symbol.base;
    made.start = static_cast<std::uint16_t>(start);
    made.others = static_cast<std::uint16_t>((1u << bits) - f);
    made.raw = symbol.raw;
    if (f == 1) {
        made.reciprocal = ~std::uint64_t{0};
        made.start = static_cast<std::uint16_t>(made.start + made.others);
        return made;
    }
    const unsigned shift = static_cast<unsigned>(std::bit_width(f - 1)) - 1;  // 2^shift < f <= 2^(shift + 1)
    const Wide power = Wide{1} << (64 + shift);
    const Wide reciprocal = (power + f - 1) / f;
    // The quotient is too large by x excess / (f power), which must not reach 1 / f.
    const Wide excess = reciprocal * f - power;
    const bool exact = excess * f < Wide{1} << (shift + bits);
    made.reciprocal = exact ? static_cast<std::uint64_t>(reciprocal) : 0;
    made.shift = exact ? static_cast<std::uint8_t>(shift) : no_shift;
    return made;
}

std::vector<EncodedSymbol> encoded(const Alphabet& alphabet, unsigned bits) {
    std::vector<EncodedSymbol> symbols;
    std::uint32_t start = 0;
    for (const Symbol& symbol : alphabet) {
        symbols.push_back(encoded(symbol, start, bits));
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
    table.symbols = encoded(alphabet, precision);
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
    std::uint32_t* at = nullptr;  // of the word written last; one before it may be written over

    // As arithmetic, here and below: which of the two ways it is no processor guesses.
    void emit(bool needed) {
        at[-1] = static_cast<std::uint32_t>(state);
        at -= needed;
        state = needed ? state >> 32 : state;
    }
    template <unsigned bits>
    void symbol(const EncodedSymbol& symbol) {
        emit(state > symbol.most);
        std::uint64_t quotient =
            static_cast<std::uint64_t>(Wide{state} * symbol.reciprocal >> 64) >> (symbol.shift & 63);
        if (symbol.shift == no_shift) [[unlikely]]
            quotient = state / ((1u << bits) - symbol.others);
        state += symbol.start + quotient * symbol.others;
    }
    void raw(std::uint32_t value, unsigned bits) {
        emit(state >> 1 >> (63 - bits) != 0);
        state = state << bits | value;
    }
    void value(const EncodingTable& table, std::uint32_t number, unsigned unit = 0) {
        const EncodedSymbol& found = table[number >> unit];
        raw(number - (found.base << unit), found.raw);
        symbol<precision>(found);
    }
};

// The words of a lane, from the end of their room on.
class LaneWords {
  public:
    // Room for so many more, of a lane that has written to `at`.
    std::uint32_t* room(std::uint32_t* at, std::size_t words) {
        const std::size_t used = at ? size(at) : 0;
        if (at && static_cast<std::size_t>(at - words_.get()) > words) return at;
        const std::size_t capacity = 2 * used + words + 1;
        auto more = std::make_unique_for_overwrite<std::uint32_t[]>(capacity);
        std::uint32_t* const to = more.get() + capacity - used;
        if (used > 0) std::memcpy(to, at, used * sizeof(std::uint32_t));
        words_ = std::move(more);
        capacity_ = capacity;
        return to;
    }
    std::size_t size(const std::uint32_t* at) const { return static_cast<std::size_t>(words_.get() + capacity_ - at); }

  private:
    std::unique_ptr<std::uint32_t[]> words_;
    std::size_t capacity_ = 0;
};

}  // namespace

CompactEncoder::CompactEncoder(const Model& model)
    : vocab_size_(model.vocab_size),
      listed_(static_cast<std::uint32_t>(model.listed.size())),
      classes_((model.ids.size() + classes_per_vector - 1) / classes_per_vector * classes_per_vector),
      ranks_(model.vocab_size, static_cast<std::uint16_t>(listed_)),
      costs_((listed_ + 1) * classes_),
      symbols_of_((listed_ + 1) * model.ids.size()),
      class_costs_(classes_, UINT16_MAX),
      kept_(encoding_table(model.kept, 16)),
      top_(encoding_table(model.top, 32, float_raw)),
      gold_(encoding_table(model.gold, 32, float_raw)) {
    for (std::uint32_t rank = 0; rank < listed_; ++rank) ranks_[model.listed[rank]] = static_cast<std::uint16_t>(rank);
    for (const Alphabet& alphabet : model.lse) lse_.push_back(encoding_table(alphabet, 32, float_raw));
    for (const Alphabet& alphabet : model.deltas) deltas_.push_back(encoding_table(alphabet, 24));
    class_.symbols = encoded(model.classes, precision);
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
        ids_.push_back(encoded(alphabet, id_precision));
        const std::uint16_t escape = escape_of(alphabet, listed_, model.id_bits());
        // A listed id, too, may be written as itself.
        for (std::uint32_t rank = 0; rank <= listed_; ++rank) {
            best[rank] = bits_of(alphabet[escape], id_precision);
            symbols_of_[c * (listed_ + 1) + rank] = escape;
        }
        for (std::size_t j = 0; j < alphabet.size(); ++j) {
            const Symbol& symbol = alphabet[j];
            const double bits = bits_of(symbol, id_precision);
            const std::uint64_t end = std::min<std::uint64_t>(listed_, symbol.base + (std::uint64_t{1} << symbol.raw));
            for (std::uint64_t rank = symbol.base; rank < end; ++rank)
                if (bits < best[rank]) {
                    best[rank] = bits;
                    symbols_of_[c * (listed_ + 1) + rank] = static_cast<std::uint16_t>(j);
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
        : model_(model), layout_(layout), rows_(rows), ranks_(layout.kept), costs_(model.classes_) {
        for (Row& row : row_) row.entries.resize(layout.kept);
    }

    // The last tokens first.
    void run(std::vector<std::byte>& out) {
        const std::int64_t together = lanes;
        for (std::int64_t first = (rows_.tokens - 1) / together * together; first >= 0; first -= together)
            turn(first, static_cast<std::size_t>(std::min(together, rows_.tokens - first)));
        put(out);
    }

  private:
    // An entry of a row: what its id and the delta before it are written as.
    struct Entry {
        const EncodedSymbol *id, *delta;
        std::uint32_t id_raw, delta_raw;
    };
    struct Row {
        std::size_t chosen = 0;
        std::uint32_t count = 0;
        std::vector<Entry> entries;
    };

    // Tokens [first, first + count), one of each lane: entry by entry, so that none waits for its own state alone.
    void turn(std::int64_t first, std::size_t count) {
        std::uint32_t together = count == lanes ? layout_.kept : 0;
        for (std::size_t l = 0; l < count; ++l) {
            plan(row_[l], first + static_cast<std::int64_t>(l));
            together = std::min(together, row_[l].count);
            lane_[l].at = words_[l].room(lane_[l].at, most_words(row_[l].count));
        }
        for (std::size_t l = 0; l < count; ++l)
            write(std::make_index_sequence<1>(), lane_.data() + l, row_.data() + l, together, row_[l].count);
        write(std::make_index_sequence<lanes>(), lane_.data(), row_.data(), 0, together);
        for (std::size_t l = 0; l < count; ++l) begin(lane_[l], row_[l], first + static_cast<std::int64_t>(l));
    }

    // Of a token: two for each value, and one that is written over.
    std::size_t most_words(std::uint32_t count) const {
        return 4 * std::size_t{count} + 2 * (4 + model_.lse_.size()) + 1;
    }

    void plan(Row& row, std::int64_t token) {
        const std::uint32_t count = layout_.ragged ? rows_.k_eff[token] : layout_.kept;
        const std::uint32_t* ids = rows_.ids + token * layout_.kept;
        const std::uint32_t* steps = rows_.steps + token * layout_.kept;
        check(token, count, ids, steps);
        row.count = count;
        row.chosen = choose(ids, count);
        const EncodedSymbol* const alphabet = model_.ids_[row.chosen].data();
        const std::uint16_t* const symbols = model_.symbols_of_.data() + row.chosen * (model_.listed_ + 1);
        std::uint32_t history = 0;
        for (std::uint32_t i = 0; i < count; ++i) {
            Entry& entry = row.entries[i];
            const std::uint32_t rank = ranks_[i];
            entry.id = alphabet + symbols[rank];
            const std::uint32_t value = entry.id->base >= model_.listed_ ? ids[i] + model_.listed_ : rank;
            entry.id_raw = value - entry.id->base;
            if (i == 0) continue;
            const std::uint32_t delta = steps[i] - steps[i - 1];
            entry.delta = &model_.deltas_[delta_place(i) * delta_histories + history][delta];
            entry.delta_raw = delta - entry.delta->base;
            history = delta_history(delta);
        }
    }

    template <std::size_t... l>
    static void write(std::index_sequence<l...>, Lane* lanes_of, const Row* rows, std::uint32_t from,
                      std::uint32_t to) {
        // Copies, which the stores of words cannot alias, so that they stay in registers.
        Lane lane[] = {lanes_of[l]...};
        const Entry* const entries[] = {rows[l].entries.data()...};
        const auto id = [](Lane& in, const Entry& entry) {
            in.raw(entry.id_raw, entry.id->raw);
            in.symbol<id_precision>(*entry.id);
        };
        const auto delta = [](Lane& in, const Entry& entry) {
            if (entry.delta->raw > 0) [[unlikely]]
                in.raw(entry.delta_raw, entry.delta->raw);
            in.symbol<precision>(*entry.delta);
        };
        for (std::uint32_t i = to; i-- > from;) {
            (id(lane[l], entries[l][i]), ...);
            if (i > 0) (delta(lane[l], entries[l][i]), ...);
        }
        ((lanes_of[l] = lane[l]), ...);
    }

    // What a token has before its entries.
    void begin(Lane& lane, const Row& row, std::int64_t token) const {
        if (layout_.gold) lane.value(model_.gold_, std::bit_cast<std::uint32_t>(rows_.gold[token]), float_raw);
        for (std::size_t j = model_.lse_.size(); j-- > 0;)
            lane.value(model_.lse_[j], std::bit_cast<std::uint32_t>(lse(j, token)), float_raw);
        lane.value(model_.top_, std::bit_cast<std::uint32_t>(rows_.top[token]), float_raw);
        if (layout_.ragged) lane.value(model_.kept_, row.count);
        lane.symbol<precision>(model_.class_.symbols[model_.class_.of[row.chosen]]);
    }

    void put(std::vector<std::byte>& out) const {
        std::array<std::uint32_t, lanes> words{};
        std::size_t size = lanes * sizeof(std::uint32_t);
        for (std::size_t l = 0; l < lanes; ++l) {
            if (lane_[l].at) words[l] = static_cast<std::uint32_t>(words_[l].size(lane_[l].at));
            size += sizeof(Lane::state) + sizeof(std::uint32_t) * words[l];
        }
        const std::size_t before = out.size();
        out.resize(before + (size + 7) / 8 * 8);
        std::byte* at = out.data() + before;
        const auto copy = [&at](const void* from, std::size_t bytes) {
            if (bytes > 0) std::memcpy(at, from, bytes);
            at += bytes;
        };
        copy(words.data(), sizeof words);
        for (std::size_t l = 0; l < lanes; ++l) {
            copy(&lane_[l].state, sizeof(Lane::state));
            copy(lane_[l].at, sizeof(std::uint32_t) * words[l]);
        }
    }

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
        if (model_.ids_.size() == 1) return 0;
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
    std::array<Row, lanes> row_;
    std::array<Lane, lanes> lane_;
    std::array<LaneWords, lanes> words_;
};

void CompactEncoder::encode(const Layout& layout, const QuantisedSource& rows, std::vector<std::byte>& out) const {
    if (layout.vocab_size != vocab_size_ || layout.temperatures.size() != lse_.size())
        throw ArgumentError("a model of another vocabulary or of other temperatures");
    CompactWriting(*this, layout, rows).run(out);
}

}  // namespace kdfast::cache
