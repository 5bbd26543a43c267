#include "cache/compact/entries.h"

#include <utility>

namespace kdfast::cache {
namespace {

// A lane, and the row that it reads at the moment.
struct LaneAndRow : LaneReader {
    std::uint64_t steps = 0;
    const std::uint32_t* transitions = nullptr;
    const std::uint32_t* values = nullptr;
    std::int32_t* ids = nullptr;
    float* logprobs = nullptr;
    float top = 0;
    std::uint32_t history = 0;

    template <unsigned bits>
    KDFAST_INLINE void move(std::uint32_t transition) {
        using T = Transition<bits>;
        state = ((transition & T::mask) + std::uint64_t{1}) * (state >> bits) + (transition >> bits & T::mask);
        refill();
    }
};

class EntriesByFour {
  public:
    explicit EntriesByFour(CompactEntries& entries) : e_(entries) {}

    Broken run() {
        for (std::size_t first = 0; first < e_.rows; first += at_once) {
            const std::size_t count = e_.rows - first < at_once ? e_.rows - first : at_once;
            LaneAndRow row[at_once];
            std::uint32_t together = count == at_once ? e_.count[first] : 0;
            for (std::size_t l = 0; l < count; ++l) {
                const std::size_t r = first + l;
                row[l] = {{e_.state[r], e_.at[r], e_.end[r]},
                          0,
                          e_.transitions[r],
                          e_.values[r],
                          e_.ids[r],
                          e_.logprobs[r],
                          e_.top[r],
                          0};
                together = e_.count[r] < together ? e_.count[r] : together;
            }
            if (count == at_once) entries(std::make_index_sequence<at_once>(), row, 0, together);
            for (std::size_t l = 0; l < count; ++l) {
                entries(std::make_index_sequence<1>(), row + l, together, e_.count[first + l]);
                e_.state[first + l] = row[l].state;
                e_.at[first + l] = row[l].at;
                high_ |= row[l].ids && row[l].steps >> 24 != 0;
            }
            if (ended_) return Broken::words;
        }
        return wrong_ ? Broken::id : high_ ? Broken::steps : Broken::none;
    }

  private:
    static constexpr std::size_t at_once = 4;

    // Entries [from, to) of as many rows, entry by entry: a lane waits for its own state alone.
    template <std::size_t... l>
    void entries(std::index_sequence<l...>, LaneAndRow* rows, std::uint32_t from, std::uint32_t to) {
        using Delta = Transition<precision>;
        using Id = Transition<id_precision>;
        // Copies, which the stores to the rows cannot alias, so that they stay in registers.
        LaneAndRow row[] = {rows[l]...};
        const std::uint32_t vocab_size = e_.vocab_size, listed = e_.listed_count;
        const std::uint32_t *const ranks = e_.listed, *const deltas = e_.delta_values;
        const std::uint32_t* const transitions = e_.delta_transitions;
        const float step = e_.step;
        bool wrong = false, ended = false;
        const auto delta = [&](LaneAndRow& in, std::uint32_t place) KDFAST_INLINE_LAMBDA {
            const std::size_t slot = ((place + in.history) << precision) + (in.state & Delta::mask);
            const std::uint32_t transition = transitions[slot];
            std::uint32_t value = deltas[slot];
            in.move<precision>(transition);
            in.history = transition >> history_bit;
            if (const std::uint32_t bits = transition >> Delta::raw_bit & 31) [[unlikely]] {
                value += in.raw(bits);
                in.history = delta_history(value);
            }
            in.steps += value;
        };
        const auto id = [&](LaneAndRow& in, std::uint32_t i) KDFAST_INLINE_LAMBDA {
            const std::size_t slot = in.state & Id::mask;
            const std::uint32_t transition = in.transitions[slot];
            std::uint32_t value = in.values[slot];
            in.move<id_precision>(transition);
            value += in.raw(transition >> Id::raw_bit);
            // As arithmetic: no processor guesses which of the two it is.
            const std::uint32_t is_listed = 0u - (value < listed);
            const std::uint32_t found = (ranks[value & is_listed] & is_listed) | ((value - listed) & ~is_listed);
            if (!in.ids) return;
            wrong |= found >= vocab_size;
            in.ids[i] = static_cast<std::int32_t>(found);
            in.logprobs[i] = in.top - static_cast<float>(static_cast<std::uint32_t>(in.steps)) * step;
        };
        for (std::uint32_t i = from; i < to && !ended; ++i) {
            const std::uint32_t place = delta_place(i) * delta_histories;
            if (i > 0) (delta(row[l], place), ...);
            (id(row[l], i), ...);
            ended = ((row[l].at > row[l].end) || ...);
        }
        ((rows[l] = row[l]), ...);
        wrong_ |= wrong;
        ended_ |= ended;
    }

    CompactEntries& e_;
    bool ended_ = false, wrong_ = false, high_ = false;
};

}  // namespace

Broken decode_entries(CompactEntries& entries) { return EntriesByFour(entries).run(); }

}  // namespace kdfast::cache
