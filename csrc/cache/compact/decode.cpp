#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "cache/compact/compact.h"
#include "cache/compact/lanes.h"
#include "cache/fault.h"

namespace kdfast::cache {
namespace {

[[noreturn]] void corrupt(const std::string& what) { throw Fault(Code::corrupt, "compact block: " + what); }

// In base_raw of a delta, which is below 2^24: the history that it is to the next one.
constexpr unsigned history_bit = 30;

void decode_alphabet(const Alphabet& alphabet, auto* slots, DecodedSymbol* symbols) {
    std::uint32_t start = 0;
    for (std::size_t j = 0; j < alphabet.size(); ++j) {
        const Symbol& symbol = alphabet[j];
        symbols[j] = {symbol.base << 6 | symbol.raw, symbol.frequency, static_cast<std::uint16_t>(start)};
        for (const std::uint32_t end = start + symbol.frequency; start < end; ++start)
            slots[start] = static_cast<std::remove_reference_t<decltype(*slots)>>(j);
    }
}

DecodingTable<std::uint16_t> decoding_table(const Alphabet& alphabet, unsigned bits) {
    DecodingTable<std::uint16_t> table;
    table.slots.resize(std::size_t{1} << bits);
    table.symbols.resize(alphabet.size());
    decode_alphabet(alphabet, table.slots.data(), table.symbols.data());
    return table;
}

struct Lane {
    std::uint64_t state = 0;
    const std::byte* at = nullptr;
    const std::byte* end = nullptr;

    // The load is legal behind the end too: whoever reads checks after at most words_between_checks of them.
    void refill() {
        std::uint32_t word;
        std::memcpy(&word, at, sizeof(word));
        // As arithmetic: a branch would be mispredicted about once for two entries.
        const std::uint64_t low = state < lane_start;
        state = state << (low * 32) | (word & (0 - low));
        at += low * sizeof(word);
    }
    template <unsigned bits, class Index>
    DecodedSymbol symbol(const Index* slots, const DecodedSymbol* symbols) {
        const auto slot = static_cast<std::uint32_t>(state & ((1u << bits) - 1));
        const DecodedSymbol found = symbols[slots[slot]];
        state = found.frequency * (state >> bits) + slot - found.start;
        refill();
        return found;
    }
    std::uint32_t raw(std::uint32_t bits) {
        const auto value = static_cast<std::uint32_t>(state & ((std::uint64_t{1} << bits) - 1));
        state >>= bits;
        refill();
        return value;
    }
    std::uint32_t value(const DecodingTable<std::uint16_t>& table, unsigned unit = 0) {
        const DecodedSymbol found = symbol<precision>(table.slots.data(), table.symbols.data());
        const std::uint32_t low = raw(found.base_raw & 63);
        if (at > end) corrupt("a lane ends too early");
        return ((found.base_raw >> 6) << unit) + low;
    }
    float number(const DecodingTable<std::uint16_t>& table) { return std::bit_cast<float>(value(table, float_raw)); }
};
static_assert((words_between_checks + 1) * 4 <= padding_after_block);

// What a lane decodes at the moment.
struct Row {
    const std::uint16_t* slots = nullptr;
    const DecodedSymbol* symbols = nullptr;
    std::uint32_t* ids = nullptr;
    std::uint32_t* steps = nullptr;
    std::uint32_t count = 0, history = 0;
    std::uint64_t step = 0;  // checked at the end alone: it never falls, and cannot overflow
    bool wrong = false;
};

}  // namespace

CompactDecoder::CompactDecoder(const Model& model)
    : vocab_size_(model.vocab_size),
      listed_(model.listed),
      classes_(decoding_table(model.classes, precision)),
      kept_(decoding_table(model.kept, precision)),
      top_(decoding_table(model.top, precision)),
      gold_(decoding_table(model.gold, precision)),
      delta_slots_(delta_contexts << precision),
      delta_symbols_(delta_contexts * most_delta_symbols) {
    for (const Alphabet& alphabet : model.lse) lse_.push_back(decoding_table(alphabet, precision));
    for (const Alphabet& alphabet : model.ids) ids_.push_back(decoding_table(alphabet, id_precision));
    for (std::uint32_t c = 0; c < delta_contexts; ++c)
        decode_alphabet(model.deltas[c], delta_slots_.data() + (std::size_t{c} << precision),
                        delta_symbols_.data() + c * most_delta_symbols);
    for (DecodedSymbol& symbol : delta_symbols_) symbol.base_raw |= delta_history(symbol.base_raw >> 6) << history_bit;
}

// One call of decode: what its loops need beside the lanes.
class CompactReading {
  public:
    CompactReading(const CompactDecoder& model, const Layout& layout, std::int64_t first,
                   const QuantisedDestination& out)
        : model_(model),
          layout_(layout),
          first_(first),
          out_(out),
          scratch_(first > 0 ? 2 * lanes * std::size_t{layout.kept} : 0),
          listed_(model.listed_.data()),
          listed_count_(static_cast<std::uint32_t>(model.listed_.size())) {}

    // The tokens of one turn, one for each of `count` lanes.
    void turn(Lane* lane, std::int64_t token, std::size_t count) {
        std::array<Row, lanes> rows;
        for (std::size_t l = 0; l < count; ++l) rows[l] = begin(lane[l], token + static_cast<std::int64_t>(l), l);
        std::uint32_t together = 0;
        if (count == lanes) {
            together = std::min({rows[0].count, rows[1].count, rows[2].count, rows[3].count});
            entries<lanes>(lane, rows.data(), 0, together);
        }
        for (std::size_t l = 0; l < count; ++l) {
            entries<1>(lane + l, rows.data() + l, together, rows[l].count);
            finish(rows[l], token + static_cast<std::int64_t>(l));
        }
    }

  private:
    Row begin(Lane& lane, std::int64_t token, std::size_t l) {
        Row row;
        const auto& ids = model_.ids_[lane.value(model_.classes_)];
        row.slots = ids.slots.data();
        row.symbols = ids.symbols.data();
        row.count = layout_.ragged ? lane.value(model_.kept_) : layout_.kept;
        if (row.count > layout_.kept) corrupt("more entries than kept, token " + std::to_string(token));
        const float top = lane.number(model_.top_);
        if (!std::isfinite(top) || top > 0 || (row.count == 0 && std::bit_cast<std::uint32_t>(top) != 0))
            corrupt("top of token " + std::to_string(token));
        const bool wanted = token >= first_;
        const std::int64_t at = token - first_;
        for (std::size_t j = 0; j < model_.lse_.size(); ++j) {
            const float lse = lane.number(model_.lse_[j]);
            if (!std::isfinite(lse)) corrupt("lse of token " + std::to_string(token));
            if (wanted) out_.lse[static_cast<std::int64_t>(j) * out_.lse_stride + at] = lse;
        }
        if (layout_.gold) {
            const float gold = lane.number(model_.gold_);
            if (!(gold <= 0)) corrupt("gold of token " + std::to_string(token));
            if (wanted) out_.gold[at] = gold;
        }
        const std::size_t kept = layout_.kept;
        if (wanted) {
            out_.top[at] = top;
            if (layout_.ragged) out_.k_eff[at] = static_cast<std::uint16_t>(row.count);
            row.ids = out_.ids + static_cast<std::size_t>(at) * kept;
            row.steps = out_.steps + static_cast<std::size_t>(at) * kept;
        } else {
            row.ids = scratch_.data() + 2 * l * kept;
            row.steps = row.ids + kept;
        }
        return row;
    }

    // The entries [from, to) of `count` rows, entry by entry: a lane waits for its own state alone, so that the others
    // fill the time.
    template <std::size_t count>
    void entries(Lane* lanes_of, Row* rows_of, std::uint32_t from, std::uint32_t to) {
        entries(std::make_index_sequence<count>(), lanes_of, rows_of, from, to);
    }
    template <std::size_t... l>
    void entries(std::index_sequence<l...>, Lane* lanes_of, Row* rows_of, std::uint32_t from, std::uint32_t to) {
        // Copies, which the stores to the rows cannot alias, so that they stay in registers.
        Lane lane[] = {lanes_of[l]...};
        Row row[] = {rows_of[l]...};
        const std::uint32_t vocab_size = model_.vocab_size_, listed_count = listed_count_;
        const std::uint32_t* const listed = listed_;
        const std::uint8_t* const delta_slots = model_.delta_slots_.data();
        const DecodedSymbol* const delta_symbols = model_.delta_symbols_.data();
        const auto id = [&](Lane& in, Row& to_row, std::uint32_t i) {
            const DecodedSymbol found = in.symbol<id_precision>(to_row.slots, to_row.symbols);
            const std::uint32_t value = (found.base_raw >> 6) + in.raw(found.base_raw & 63);
            to_row.steps[i] = static_cast<std::uint32_t>(to_row.step);
            if (value < listed_count) [[likely]] {
                to_row.ids[i] = listed[value];
            } else {
                to_row.ids[i] = value - listed_count;
                to_row.wrong |= value - listed_count >= vocab_size;
            }
        };
        const auto delta = [&](Lane& in, Row& to_row, std::uint32_t place) {
            const std::size_t context = place + to_row.history;
            const DecodedSymbol found = in.symbol<precision>(delta_slots + (context << precision),
                                                             delta_symbols + context * most_delta_symbols);
            to_row.history = found.base_raw >> history_bit;
            std::uint32_t step = found.base_raw << (32 - history_bit) >> (32 - history_bit + 6);
            if (found.base_raw & 63) [[unlikely]] {
                step += in.raw(found.base_raw & 63);
                to_row.history = delta_history(step);
            }
            to_row.step += step;
        };
        for (std::uint32_t i = from; i < to; ++i) {
            const std::uint32_t place = delta_place(i) * delta_histories;
            if (i > 0) (delta(lane[l], row[l], place), ...);
            (id(lane[l], row[l], i), ...);
            if (((lane[l].at > lane[l].end) || ...)) corrupt("a lane ends too early");
        }
        ((lanes_of[l] = lane[l], rows_of[l] = row[l]), ...);
    }

    void finish(const Row& row, std::int64_t token) {
        if (row.wrong || row.step >> 24 != 0) corrupt("an entry out of range, token " + std::to_string(token));
        std::fill(row.ids + row.count, row.ids + layout_.kept, 0u);
        std::fill(row.steps + row.count, row.steps + layout_.kept, 0u);
    }

    const CompactDecoder& model_;
    const Layout& layout_;
    std::int64_t first_;
    const QuantisedDestination& out_;
    std::vector<std::uint32_t> scratch_;
    const std::uint32_t* listed_;
    std::uint32_t listed_count_;
};

void CompactDecoder::decode(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens,
                            std::int64_t first, const QuantisedDestination& out) const {
    if (layout.vocab_size != vocab_size_ || layout.temperatures.size() != lse_.size())
        corrupt("its model is of another vocabulary or of other temperatures");
    std::array<std::uint32_t, lanes> words{};
    if (block.size() < sizeof(words)) corrupt("shorter than its lanes' lengths");
    std::memcpy(words.data(), block.data(), sizeof(words));
    std::uint64_t size = sizeof(words);
    for (const std::uint32_t count : words) size += sizeof(Lane::state) + 4 * std::uint64_t{count};
    if (block.size() != (size + 7) / 8 * 8) corrupt("its length is not that of its lanes");
    for (std::size_t j = size; j < block.size(); ++j)
        if (block[j] != std::byte{0}) corrupt("padding that is not zero");

    std::array<Lane, lanes> lane;
    const std::byte* at = block.data() + sizeof(words);
    for (std::size_t l = 0; l < lanes; ++l) {
        std::memcpy(&lane[l].state, at, sizeof(Lane::state));
        if (lane[l].state < lane_start) corrupt("a state out of range");
        lane[l].at = at + sizeof(Lane::state);
        at = lane[l].end = lane[l].at + 4 * std::size_t{words[l]};
    }
    CompactReading reading(*this, layout, first, out);
    const std::int64_t last = first + out.tokens;
    for (std::int64_t token = 0; token < last; token += lanes)
        reading.turn(lane.data(), token, static_cast<std::size_t>(std::min<std::int64_t>(lanes, last - token)));
    for (const Lane& l : lane)
        if (last == tokens && (l.state != lane_start || l.at != l.end)) corrupt("a lane does not end with its tokens");
}

}  // namespace kdfast::cache
