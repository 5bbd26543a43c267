#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "cache/compact/compact.h"
#include "cache/compact/lanes.h"
#include "cache/fault.h"
#include "cache/kernels.h"
#include "core/error.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
namespace {

[[noreturn]] void corrupt(const std::string& what) { throw Fault(Code::corrupt, "compact block: " + what); }

DecodingTable decoding_table(const Alphabet& alphabet) {
    DecodingTable table;
    std::uint32_t start = 0;
    for (const Symbol& symbol : alphabet) {
        table.slots.insert(table.slots.end(), symbol.frequency, static_cast<std::uint16_t>(table.symbols.size()));
        table.symbols.push_back({symbol.base << 6 | symbol.raw, symbol.frequency, static_cast<std::uint16_t>(start)});
        start += symbol.frequency;
    }
    return table;
}

// Appends an alphabet of that precision.
template <unsigned bits>
void append(EntryTable& table, const Alphabet& alphabet) {
    for (const Symbol& symbol : alphabet)
        for (std::uint32_t place = 0; place < symbol.frequency; ++place) {
            table.transitions.push_back((symbol.frequency - 1u) | place << bits |
                                        std::uint32_t{symbol.raw} << Transition<bits>::raw_bit);
            table.values.push_back(symbol.base);
        }
}

struct Lane : LaneReader {
    std::uint32_t value(const DecodingTable& table, unsigned unit = 0) {
        const DecodedSymbol found = symbol(table.slots.data(), table.symbols.data());
        const std::uint32_t low = raw(found.base_raw & 63);
        if (at > end) corrupt("a lane ends too early");
        return ((found.base_raw >> 6) << unit) + low;
    }
    float number(const DecodingTable& table) { return std::bit_cast<float>(value(table, float_raw)); }
};
static_assert((words_between_checks + 1) * 4 <= padding_after_block);

}  // namespace

CompactDecoder::CompactDecoder(const Model& model)
    : vocab_size_(model.vocab_size),
      listed_(model.listed),
      classes_(decoding_table(model.classes)),
      kept_(decoding_table(model.kept)),
      top_(decoding_table(model.top)),
      gold_(decoding_table(model.gold)) {
    for (const Alphabet& alphabet : model.lse) lse_.push_back(decoding_table(alphabet));
    for (const Alphabet& alphabet : model.deltas) append<precision>(deltas_, alphabet);
    for (std::size_t i = 0; i < deltas_.values.size(); ++i)
        deltas_.transitions[i] |= delta_history(deltas_.values[i]) << history_bit;
    const auto listed = static_cast<std::uint32_t>(listed_.size());
    for (const Alphabet& alphabet : model.ids) {
        EntryTable& table = ids_.emplace_back();
        append<id_precision>(table, alphabet);
        for (std::size_t i = 0; i < table.values.size(); ++i)
            if (std::uint32_t& value = table.values[i];
                value < listed && table.transitions[i] >> Transition<id_precision>::raw_bit == 0)
                value = listed + listed_[value];
    }
    deltas_.values.push_back(0);
    listed_.push_back(0);
}

// One call of decode.
class CompactReading {
  public:
    CompactReading(const CompactDecoder& model, const Layout& layout, std::span<const DecodeRequest> parts)
        : model_(model), layout_(layout), parts_(parts) {
        for (std::size_t p = 0; p < parts.size(); ++p) begin(parts[p].block, p);
        entries_.delta_transitions = model.deltas_.transitions.data();
        entries_.delta_values = model.deltas_.values.data();
        entries_.listed = model.listed_.data();
        entries_.listed_count = static_cast<std::uint32_t>(model.listed_.size() - 1);
        entries_.vocab_size = model.vocab_size_;
        entries_.step = std::ldexp(1.0f, -static_cast<int>(layout.grid));
    }

    void run() {
        std::int64_t most = 0;
        for (const DecodeRequest& part : parts_) most = std::max(most, part.first + part.out.tokens);
        for (std::int64_t token = 0; token < most; token += lanes) turn(token);
        for (std::size_t p = 0; p < parts_.size(); ++p)
            for (const Lane& lane : lanes_[p])
                if (parts_[p].first + parts_[p].out.tokens == parts_[p].tokens &&
                    (lane.state != lane_start || lane.at != lane.end))
                    corrupt("a lane does not end with its tokens");
    }

  private:
    void begin(std::span<const std::byte> block, std::size_t part) {
        std::array<std::uint32_t, lanes> words{};
        if (block.size() < sizeof(words)) corrupt("shorter than its lanes' lengths");
        std::memcpy(words.data(), block.data(), sizeof(words));
        std::uint64_t size = sizeof(words);
        for (const std::uint32_t count : words) size += sizeof(Lane::state) + 4 * std::uint64_t{count};
        if (block.size() != (size + 7) / 8 * 8) corrupt("its length is not that of its lanes");
        for (std::size_t j = size; j < block.size(); ++j)
            if (block[j] != std::byte{0}) corrupt("padding that is not zero");
        const std::byte* at = block.data() + sizeof(words);
        for (std::size_t l = 0; l < lanes; ++l) {
            Lane& lane = lanes_[part][l];
            std::memcpy(&lane.state, at, sizeof(Lane::state));
            if (lane.state < lane_start) corrupt("a state out of range");
            lane.at = at + sizeof(Lane::state);
            at = lane.end = lane.at + 4 * std::size_t{words[l]};
        }
    }

    // The next token of each lane that has one which somebody asks for, or which lies before such a one.
    void turn(std::int64_t first) {
        std::array<Lane*, CompactEntries::most> of;
        std::size_t rows = 0;
        for (std::size_t p = 0; p < parts_.size(); ++p)
            for (std::size_t l = 0; l < lanes; ++l) {
                const std::int64_t token = first + static_cast<std::int64_t>(l);
                if (token >= parts_[p].first + parts_[p].out.tokens) break;
                of[rows] = &lanes_[p][l];
                start(lanes_[p][l], parts_[p], token, rows++);
            }
        entries_.rows = rows;
        switch (kernels_.decode_compact(entries_)) {
            case Broken::none:
                break;
            case Broken::words:
            case Broken::escapes:
                corrupt("a lane ends too early");
            case Broken::id:
                corrupt("an id out of range, token " + std::to_string(first) + " or soon after");
            case Broken::steps:
                corrupt("2^24 steps or more, token " + std::to_string(first) + " or soon after");
        }
        for (std::size_t r = 0; r < rows; ++r) {
            of[r]->state = entries_.state[r];
            of[r]->at = entries_.at[r];
            if (!entries_.ids[r]) continue;
            std::fill(entries_.ids[r] + entries_.count[r], entries_.ids[r] + layout_.kept, -1);
            std::fill(entries_.logprobs[r] + entries_.count[r], entries_.logprobs[r] + layout_.kept,
                      -std::numeric_limits<float>::infinity());
        }
    }

    // What a token has before its entries.
    void start(Lane& lane, const DecodeRequest& part, std::int64_t token, std::size_t row) {
        const Destination& out = part.out;
        const std::int64_t at = token - part.first;
        const bool wanted = at >= 0;
        const auto& ids = model_.ids_[lane.value(model_.classes_)];
        const std::uint32_t count = layout_.ragged ? lane.value(model_.kept_) : layout_.kept;
        if (count > layout_.kept) corrupt("more entries than kept, token " + std::to_string(token));
        const float top = lane.number(model_.top_);
        if (!std::isfinite(top) || top > 0 || (count == 0 && std::bit_cast<std::uint32_t>(top) != 0))
            corrupt("top of token " + std::to_string(token));
        for (std::size_t j = 0; j < model_.lse_.size(); ++j) {
            const float lse = lane.number(model_.lse_[j]);
            if (!std::isfinite(lse)) corrupt("lse of token " + std::to_string(token));
            if (wanted && out.lse) out.lse[static_cast<std::int64_t>(j) * out.lse_stride + at] = lse;
        }
        if (layout_.gold) {
            const float gold = lane.number(model_.gold_);
            if (!(gold <= 0)) corrupt("gold of token " + std::to_string(token));
            if (wanted && out.gold) out.gold[at] = gold;
        }
        if (wanted && out.k_eff) out.k_eff[at] = static_cast<std::int32_t>(count);
        entries_.state[row] = lane.state;
        entries_.at[row] = lane.at;
        entries_.end[row] = lane.end;
        entries_.transitions[row] = ids.transitions.data();
        entries_.values[row] = ids.values.data();
        entries_.count[row] = count;
        entries_.top[row] = top;
        entries_.ids[row] = wanted ? out.ids + at * layout_.kept : nullptr;
        entries_.logprobs[row] = wanted ? out.logprobs + at * layout_.kept : nullptr;
    }

    const Kernels& kernels_ = *cpu::kernels().cache;
    const CompactDecoder& model_;
    const Layout& layout_;
    std::span<const DecodeRequest> parts_;
    std::array<std::array<Lane, lanes>, most_together> lanes_;
    CompactEntries entries_;
};

void CompactDecoder::decode(const Layout& layout, std::span<const DecodeRequest> blocks) const {
    if (layout.vocab_size != vocab_size_ || layout.temperatures.size() != lse_.size())
        corrupt("its model is of another vocabulary or of other temperatures");
    if (blocks.size() > most_together) throw ArgumentError("more blocks than are decoded together");
    CompactReading(*this, layout, blocks).run();
}

}  // namespace kdfast::cache
