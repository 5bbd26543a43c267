#include "cache/compact/learn.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <span>
#include <utility>

namespace kdfast::cache {
namespace {

constexpr std::size_t most_single = 1023;       // values of an alphabet with a symbol of their own
constexpr std::uint32_t delta_limit = 128;      // deltas from here on are escapes
constexpr std::uint32_t listed_from_count = 2;  // an id seen once is as likely not to come again
constexpr double prior_of_class = 1024;         // entries of all rows that a class starts from, when rows are assigned
constexpr double prior_of_buckets = 32;         // the same for buckets and escape of its alphabet
constexpr int rounds = 12;

// Buckets: values below 16 alone, then eight to an octave.
Symbol bucket(std::uint32_t value) {
    if (value < 16) return {value, 0, 0};
    const unsigned raw = static_cast<unsigned>(std::bit_width(value)) - 4;
    return {value >> raw << raw, 0, static_cast<std::uint8_t>(raw)};
}

// Frequencies that sum to 2^bits and are at least 1, the sum of weight log(frequency) being greatest.
void normalise(Alphabet& alphabet, const std::vector<double>& weights, unsigned bits) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    const std::int64_t target = std::int64_t{1} << bits;
    std::int64_t sum = 0;
    for (std::size_t j = 0; j < alphabet.size(); ++j) {
        const double share = total > 0 ? weights[j] / total * static_cast<double>(target) : 0;
        alphabet[j].frequency = static_cast<std::uint16_t>(std::max(1.0, std::floor(share)));
        sum += alphabet[j].frequency;
    }
    const int step = sum < target ? 1 : -1;
    const auto gain = [&](std::size_t j) {
        const double frequency = alphabet[j].frequency;
        return frequency + step < 1 ? -std::numeric_limits<double>::infinity()
                                    : weights[j] * std::log((frequency + step) / frequency);
    };
    std::priority_queue<std::pair<double, std::size_t>> next;
    for (std::size_t j = 0; j < alphabet.size(); ++j) next.emplace(gain(j), j);
    for (; sum != target; sum += step) {
        const std::size_t j = next.top().second;
        next.pop();
        alphabet[j].frequency = static_cast<std::uint16_t>(alphabet[j].frequency + step);
        next.emplace(gain(j), j);
    }
}

// `counts` by value; a value that is rarer than one slot goes to its bucket, where there are any, and what is rarer
// still to the escape. `prior` is added to the buckets and the escape, by the shares that `all` has in them.
Alphabet alphabet_of(std::span<const double> counts, unsigned bits, Symbol escape, double escape_count, bool buckets,
                     unsigned unit = 0, std::span<const double> all = {}, double all_escape = 0, double prior = 0) {
    const double slots = static_cast<double>(std::size_t{1} << bits);
    const double total = std::accumulate(counts.begin(), counts.end(), escape_count);
    std::vector<double> ordered(counts.begin(), counts.end());
    double least = std::max(total / slots, 1.0);
    if (ordered.size() > most_single) {
        std::nth_element(ordered.begin(), ordered.begin() + most_single, ordered.end(), std::greater<>());
        least = std::max(least, ordered[most_single] + 0.5);
    }
    const double all_total = std::accumulate(all.begin(), all.end(), all_escape);
    const double scale = all_total > 0 ? prior / all_total : 0;

    Alphabet alphabet;
    std::vector<double> weights;
    double rest = escape_count + all_escape * scale;
    for (std::uint32_t value = 0; value < counts.size();) {
        const Symbol shared = buckets ? bucket(value) : Symbol{value, 0, 0};
        const auto end = static_cast<std::uint32_t>(
            std::min<std::size_t>(counts.size(), std::size_t{value} + (std::size_t{1} << shared.raw)));
        double left = 0;
        const std::size_t place = alphabet.size();
        for (std::uint32_t v = value; v < end; ++v) {
            if (!all.empty()) left += all[v] * scale;
            if (counts[v] < least) {
                left += counts[v];
                continue;
            }
            alphabet.push_back({v, 0, static_cast<std::uint8_t>(unit)});
            weights.push_back(counts[v]);
        }
        if (shared.raw > 0 && left >= total / slots / 2 && left > 0) {
            alphabet.insert(alphabet.begin() + static_cast<std::ptrdiff_t>(place), shared);
            weights.insert(weights.begin() + static_cast<std::ptrdiff_t>(place), left);
        } else if (shared.raw == 0 && alphabet.size() > place) {
            weights.back() += left;
        } else {
            rest += left;
        }
        value = end;
    }
    const auto place =
        std::find_if(alphabet.begin(), alphabet.end(), [&](const Symbol& s) { return s.base >= escape.base; });
    weights.insert(weights.begin() + (place - alphabet.begin()), rest);
    alphabet.insert(place, escape);
    normalise(alphabet, weights, bits);
    return alphabet;
}

double bits_of(const Symbol& symbol, unsigned total) {
    return total - std::log2(static_cast<double>(symbol.frequency)) + symbol.raw;
}

// Rows as ranks; those of unlisted ids are `listed`.
struct Rows {
    std::vector<std::uint16_t> ranks;
    std::vector<std::size_t> ends{0};
    std::size_t listed = 0;

    std::size_t size() const { return ends.size() - 1; }
    std::span<const std::uint16_t> operator[](std::size_t row) const {
        return {ranks.data() + ends[row], ends[row + 1] - ends[row]};
    }
};

using Labels = std::vector<std::uint8_t>;

// Of each row the class with the smallest costs; `costs` is (listed + 1, classes).
template <std::size_t classes>
std::pair<Labels, double> assign_of(const Rows& rows, const std::vector<float>& costs, const std::vector<float>& own) {
    Labels labels(rows.size());
    double total = 0;
    for (std::size_t row = 0; row < rows.size(); ++row) {
        // Of a length that a compiler knows, so that they stay in registers.
        std::array<float, classes> sum;
        std::copy_n(own.begin(), classes, sum.begin());
        for (const std::uint16_t rank : rows[row]) {
            const float* cost = costs.data() + rank * classes;
            for (std::size_t c = 0; c < classes; ++c) sum[c] += cost[c];
        }
        const auto best = std::min_element(sum.begin(), sum.end());
        labels[row] = static_cast<std::uint8_t>(best - sum.begin());
        total += *best;
    }
    return {std::move(labels), total};
}

// The numbers of classes that are tried, one after the other.
constexpr std::array<std::size_t, 4> tried_classes = {1, 4, 16, 32};

std::pair<Labels, double> assign(const Rows& rows, const std::vector<float>& costs, const std::vector<float>& own) {
    switch (own.size()) {
        case tried_classes[0]:
            return assign_of<tried_classes[0]>(rows, costs, own);
        case tried_classes[1]:
            return assign_of<tried_classes[1]>(rows, costs, own);
        case tried_classes[2]:
            return assign_of<tried_classes[2]>(rows, costs, own);
        default:
            return assign_of<tried_classes[3]>(rows, costs, own);
    }
}

std::vector<std::vector<double>> count(const Rows& rows, const Labels& labels, std::size_t classes) {
    std::vector<std::vector<std::uint32_t>> counts(classes, std::vector<std::uint32_t>(rows.listed + 1));
    for (std::size_t row = 0; row < rows.size(); ++row) {
        std::uint32_t* const of_class = counts[labels[row]].data();
        for (const std::uint16_t rank : rows[row]) ++of_class[rank];
    }
    std::vector<std::vector<double>> as_numbers;
    for (const auto& of_class : counts) as_numbers.emplace_back(of_class.begin(), of_class.end());
    return as_numbers;
}

std::vector<float> class_costs(const Labels& labels, std::size_t classes) {
    std::vector<double> members(classes, 1.0);
    for (const std::uint8_t label : labels) ++members[label];
    std::vector<float> own;
    for (const double m : members)
        own.push_back(static_cast<float>(std::log2(static_cast<double>(labels.size() + classes) / m)));
    return own;
}

// Hard expectation maximisation of a mixture of unigram distributions, begun from the rows' most probable ids.
Labels cluster(const Rows& rows, std::size_t classes) {
    Labels labels(rows.size());
    if (classes == 1) return labels;
    for (std::size_t row = 0; row < rows.size(); ++row)
        labels[row] = static_cast<std::uint8_t>(rows[row].empty() ? 0 : rows[row][0] % classes);
    const std::vector<double> all = count(rows, Labels(rows.size()), 1)[0];
    const double total = std::accumulate(all.begin(), all.end(), 1.0);
    std::vector<float> costs((rows.listed + 1) * classes);
    for (int round = 0; round < rounds; ++round) {
        const auto counts = count(rows, labels, classes);
        for (std::size_t c = 0; c < classes; ++c) {
            const double own = std::accumulate(counts[c].begin(), counts[c].end(), prior_of_class);
            for (std::size_t rank = 0; rank <= rows.listed; ++rank)
                costs[rank * classes + c] = static_cast<float>(
                    std::log2(own / (counts[c][rank] + prior_of_class * (all[rank] + 0.01) / total)));
        }
        Labels next = assign(rows, costs, class_costs(labels, classes)).first;
        if (next == labels) break;
        labels = std::move(next);
    }
    return labels;
}

std::vector<Alphabet> id_alphabets(const Rows& rows, const Labels& labels, std::size_t classes, unsigned id_bits) {
    const auto all = count(rows, Labels(rows.size()), 1)[0];
    const auto counts = count(rows, labels, classes);
    const Symbol escape{static_cast<std::uint32_t>(rows.listed), 0, static_cast<std::uint8_t>(id_bits)};
    std::vector<Alphabet> alphabets;
    for (std::size_t c = 0; c < classes; ++c)
        alphabets.push_back(alphabet_of({counts[c].data(), rows.listed}, id_precision, escape, counts[c][rows.listed],
                                        true, 0, {all.data(), rows.listed}, all[rows.listed], prior_of_buckets));
    return alphabets;
}

// What the rows take in bits, classes included, and the alphabets' own size.
double measure(const Rows& rows, const std::vector<Alphabet>& alphabets, const std::vector<float>& own) {
    const std::size_t classes = alphabets.size();
    std::vector<float> costs((rows.listed + 1) * classes, std::numeric_limits<float>::infinity());
    for (std::size_t c = 0; c < classes; ++c)
        for (const Symbol& symbol : alphabets[c]) {
            const bool escape = symbol.base >= rows.listed;
            const std::size_t end =
                escape ? rows.listed + 1
                       : std::min<std::size_t>(rows.listed, symbol.base + (std::size_t{1} << symbol.raw));
            for (std::size_t rank = escape ? 0 : symbol.base; rank < end; ++rank)
                costs[rank * classes + c] =
                    std::min(costs[rank * classes + c], static_cast<float>(bits_of(symbol, id_precision)));
        }
    return assign(rows, costs, own).second;
}

}  // namespace

CompactLearner::CompactLearner(std::uint32_t vocab_size, std::size_t temperatures)
    : vocab_size_(vocab_size),
      kept_(std::size_t{1} << 16),
      top_(float_heads),
      gold_(float_heads),
      lse_(temperatures, std::vector<double>(float_heads)),
      deltas_(delta_contexts, std::vector<double>(delta_limit + 1)) {}

void CompactLearner::add(const Layout& layout, const QuantisedSource& rows) {
    const auto head = [](float value) { return std::bit_cast<std::uint32_t>(value) >> float_raw; };
    for (std::int64_t token = 0; token < rows.tokens && !full(); ++token) {
        const std::uint32_t count = layout.ragged ? rows.k_eff[token] : layout.kept;
        const std::uint32_t* ids = rows.ids + token * layout.kept;
        const std::uint32_t* steps = rows.steps + token * layout.kept;
        ids_.insert(ids_.end(), ids, ids + count);
        ends_.push_back(ids_.size());
        std::uint32_t before = 0;
        for (std::uint32_t i = 1; i < count; ++i) {
            const std::uint32_t delta = steps[i] - steps[i - 1];
            ++deltas_[delta_place(i) * delta_histories + delta_history(before)][std::min(delta, delta_limit)];
            before = delta;
        }
        if (layout.ragged) ++kept_[count];
        ++top_[head(rows.top[token])];
        if (layout.gold) ++gold_[head(rows.gold[token])];
        for (std::size_t j = 0; j < lse_.size(); ++j)
            ++lse_[j][head(rows.lse[static_cast<std::int64_t>(j) * rows.lse_stride + token])];
    }
}

Model CompactLearner::learn(std::int64_t horizon) const {
    Model model;
    model.vocab_size = vocab_size_;
    std::vector<std::uint32_t> counts(vocab_size_);
    for (const std::uint32_t id : ids_) ++counts[id];
    for (std::uint32_t id = 0; id < vocab_size_; ++id)
        if (counts[id] >= listed_from_count) model.listed.push_back(id);
    std::stable_sort(model.listed.begin(), model.listed.end(),
                     [&](std::uint32_t a, std::uint32_t b) { return counts[a] > counts[b]; });
    if (model.listed.size() > most_listed) model.listed.resize(most_listed);

    std::vector<std::uint16_t> ranks(vocab_size_, static_cast<std::uint16_t>(model.listed.size()));
    for (std::size_t rank = 0; rank < model.listed.size(); ++rank)
        ranks[model.listed[rank]] = static_cast<std::uint16_t>(rank);
    Rows all, most, some;  // some: held out when the number of classes is chosen
    all.listed = most.listed = some.listed = model.listed.size();
    for (std::size_t row = 0; row + 1 < ends_.size(); ++row)
        for (Rows* rows : {&all, row % 8 == 7 ? &some : &most}) {
            for (std::size_t j = ends_[row]; j < ends_[row + 1]; ++j) rows->ranks.push_back(ranks[ids_[j]]);
            rows->ends.push_back(rows->ranks.size());
        }

    std::size_t classes = 1;
    double least = std::numeric_limits<double>::infinity();
    for (const std::size_t tried : tried_classes) {
        const Labels labels = cluster(most, tried);
        Model trial;
        trial.ids = id_alphabets(most, labels, tried, model.id_bits());
        const double times = static_cast<double>(horizon) / static_cast<double>(std::max<std::size_t>(some.size(), 1));
        const double bits = measure(some, trial.ids, class_costs(labels, tried)) * times +
                            2 * 8 * static_cast<double>(serialise(trial).size());
        if (bits >= least) break;
        least = bits;
        classes = tried;
    }
    const Labels labels = cluster(all, classes);
    model.ids = id_alphabets(all, labels, classes, model.id_bits());

    std::vector<double> members(classes);
    for (const std::uint8_t label : labels) ++members[label];
    std::vector<double> present = members;
    for (std::size_t c = 0; c < classes; ++c) {
        model.classes.push_back({static_cast<std::uint32_t>(c), 0, 0});
        present[c] += 0.5;
    }
    normalise(model.classes, present, precision);

    const auto floats = [](const std::vector<double>& by_head) {
        return alphabet_of(by_head, precision, {0, 0, 32}, 0, false, float_raw);
    };
    model.kept = alphabet_of(kept_, precision, {0, 0, 16}, 0, true);
    model.top = floats(top_);
    model.gold = floats(gold_);
    for (const auto& one : lse_) model.lse.push_back(floats(one));
    for (std::uint32_t c = 0; c < delta_contexts; ++c)
        model.deltas[c] =
            alphabet_of({deltas_[c].data(), delta_limit}, precision, {0, 0, 24}, deltas_[c][delta_limit], true);
    return model;
}

}  // namespace kdfast::cache
