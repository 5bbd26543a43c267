// Size and speed of compact blocks. Usage: compact_bench [tokens to learn from] [tokens measured]
//
// The teacher is synthetic: V = 128256 columns, logit = -log(1 + r) + 2.5 g, with r the column's place in a fixed
// random order (Zipf's law, exponent 1) and g standard normal, anew for each token and column. 64 entries, T = 1 and 2.
// Columns are independent given their frequency, so that nothing but frequencies can be learned: a teacher that is a
// language model has less entropy.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cache/compact/learn.h"

using namespace kdfast::cache;

namespace {

constexpr std::uint32_t vocab_size = 128256, kept = 64;
constexpr std::int64_t block_tokens = 256;
constexpr double steps_per_nat = 16;

struct Rows {
    std::vector<std::uint32_t> ids, steps;
    std::vector<float> top, lse;
    std::int64_t tokens = 0;

    QuantisedSource source(std::int64_t first, std::int64_t count) const {
        QuantisedSource part;
        part.tokens = count;
        part.ids = ids.data() + first * kept;
        part.steps = steps.data() + first * kept;
        part.top = top.data() + first;
        part.lse = lse.data() + first;
        part.lse_stride = tokens;
        return part;
    }
};

Rows teach(std::int64_t tokens) {
    std::mt19937_64 random(1);
    std::vector<std::uint32_t> place(vocab_size);
    std::iota(place.begin(), place.end(), 0u);
    std::shuffle(place.begin(), place.end(), random);
    std::vector<float> prior(vocab_size), noise(1 << 22);  // a token's noise begins at a random place of the pool
    for (std::uint32_t id = 0; id < vocab_size; ++id) prior[id] = -std::log(1.0f + static_cast<float>(place[id]));
    std::normal_distribution<float> normal;
    for (float& n : noise) n = 2.5f * normal(random);

    Rows rows;
    rows.tokens = tokens;
    std::vector<std::pair<float, std::uint32_t>> best;
    for (std::int64_t token = 0; token < tokens; ++token) {
        const float* g = noise.data() + random() % (noise.size() - vocab_size);
        double sum = 0, half = 0;
        best.assign(1, {-1e30f, 0});
        for (std::uint32_t id = 0; id < vocab_size; ++id) {
            const float x = prior[id] + g[id];
            const double root = std::exp(x / 2);
            half += root;
            sum += root * root;
            if (x <= best.front().first && best.size() == kept) continue;
            if (best.size() == kept) std::pop_heap(best.begin(), best.end(), std::greater<>()), best.pop_back();
            best.emplace_back(x, id), std::push_heap(best.begin(), best.end(), std::greater<>());
        }
        std::sort(best.begin(), best.end(), std::greater<>());
        for (const auto& [x, id] : best) {
            rows.ids.push_back(id);
            rows.steps.push_back(static_cast<std::uint32_t>(std::lround((best.front().first - x) * steps_per_nat)));
        }
        rows.top.push_back(static_cast<float>(best.front().first - std::log(sum)));
        rows.lse.push_back(static_cast<float>(std::log(half) - std::log(sum) / 2));
    }
    return rows;
}

double entropy(const std::vector<std::uint32_t>& values) {
    std::vector<std::uint32_t> sorted = values;
    std::sort(sorted.begin(), sorted.end());
    double bits = 0;
    for (std::size_t from = 0, to = 0; from < sorted.size(); from = to) {
        while (to < sorted.size() && sorted[to] == sorted[from]) ++to;
        const double share = static_cast<double>(to - from) / static_cast<double>(sorted.size());
        bits -= share * std::log2(share);
    }
    return bits;
}

// The best of some rounds, in seconds.
double seconds(const std::function<void()>& work) {
    double best = 1e9;
    for (int round = 0; round < 9; ++round) {
        const auto from = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count());
    }
    return best;
}

}  // namespace

int main(int count, char** arguments) {
    const std::int64_t learned = count > 1 ? std::atoll(arguments[1]) : 8192;
    const std::int64_t wanted = count > 2 ? std::atoll(arguments[2]) : 2048;
    const std::int64_t measured = std::max<std::int64_t>(1, wanted / block_tokens) * block_tokens;
    const Rows rows = teach(learned + measured);
    const auto per_token = [&](double value) { return value / static_cast<double>(measured); };

    Layout layout;
    layout.codec = Codec::compact;
    layout.vocab_size = vocab_size;
    layout.kept = kept;
    layout.temperatures = {2};
    CompactLearner learner(vocab_size, 1);
    learner.add(layout, rows.source(0, learned));
    Model model;
    const double learning = seconds([&] { model = learner.learn(1 << 20); });
    const CompactEncoder encoder(model);
    const CompactDecoder decoder(model);

    std::vector<std::byte> bytes;
    std::vector<std::size_t> ends;
    const double encoding = seconds([&] {
        bytes.clear();
        ends.assign(1, 0);
        for (std::int64_t token = 0; token < measured; token += block_tokens) {
            encoder.encode(layout, rows.source(learned + token, block_tokens), bytes);
            ends.push_back(bytes.size());
        }
    });
    const std::size_t size = bytes.size();
    bytes.resize(size + padding_after_block);

    const auto n = static_cast<std::size_t>(measured);
    std::vector<std::int32_t> ids(n * kept);
    std::vector<float> logprobs(n * kept), lse(n);
    const auto decoded = [&](std::size_t together) {
        std::vector<DecodeRequest> requests;
        for (std::size_t block = 0; block + 1 < ends.size(); ++block) {
            const std::int64_t token = static_cast<std::int64_t>(block) * block_tokens;
            requests.push_back({{bytes.data() + ends[block], ends[block + 1] - ends[block]},
                                block_tokens,
                                0,
                                {.tokens = block_tokens,
                                 .ids = ids.data() + token * kept,
                                 .logprobs = logprobs.data() + token * kept,
                                 .lse = lse.data() + token,
                                 .lse_stride = measured}});
            if (requests.size() < together && block + 2 < ends.size()) continue;
            decoder.decode(layout, requests);
            requests.clear();
        }
    };
    const double alone = seconds([&] { decoded(1); }), pairs = seconds([&] { decoded(2); });
    const double decoding = seconds([&] { decoded(most_together); });
    const auto from = static_cast<std::size_t>(learned);
    for (std::size_t j = 0; j < n * kept; ++j) {
        const std::size_t at = from * kept + j;
        const float expected = rows.top[from + j / kept] - static_cast<float>(rows.steps[at] / steps_per_nat);
        if (static_cast<std::uint32_t>(ids[j]) != rows.ids[at] || logprobs[j] != expected) {
            std::printf("decoded values differ\n");
            return 1;
        }
    }

    std::printf("entropy of ids, order 0: %.2f bits\n", entropy(rows.ids));
    std::printf("model: %zu bytes, %zu classes, %zu ids listed, learned from %lld tokens in %.2f s\n",
                serialise(model).size(), model.ids.size(), model.listed.size(), static_cast<long long>(learned),
                learning);
    std::printf("%.2f bytes/token, blocks of %lld tokens\n", per_token(static_cast<double>(size)),
                static_cast<long long>(block_tokens));
    std::printf("M tokens/s, one thread: encode %.3f, decode %.3f, of two blocks together %.3f, of four %.3f\n",
                1e-6 / per_token(encoding), 1e-6 / per_token(alone), 1e-6 / per_token(pairs),
                1e-6 / per_token(decoding));
}
