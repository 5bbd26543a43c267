// The compact tier: what goes in comes out, whatever the model has seen, and hostile bytes end in a Fault or in values
// that are legal.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cache/compact/learn.h"
#include "cache/fault.h"
#include "core/error.h"
#include "harness.h"
#include "isas.h"

using namespace kdfast;
using namespace kdfast::cache;
using namespace kdfast::test;

namespace {

std::uint32_t below(Random& random, std::uint64_t limit) { return static_cast<std::uint32_t>(random() % limit); }

// Rows that own their numbers.
struct Given {
    Layout layout;
    std::int64_t tokens = 0;
    std::vector<std::uint32_t> ids, steps;
    std::vector<float> top, lse, gold;
    std::vector<std::uint16_t> k_eff;

    Given(const Layout& of, std::int64_t count) : layout(of), tokens(count) {
        const auto n = static_cast<std::size_t>(count);
        ids.resize(n * of.kept);
        steps.resize(n * of.kept);
        top.resize(n);
        lse.resize(n * of.temperatures.size());
        gold.resize(n);
        k_eff.resize(n);
    }
    QuantisedSource source() const {
        return {tokens, ids.data(), steps.data(), top.data(), lse.data(), tokens, gold.data(), k_eff.data()};
    }
};

Layout layout_of(std::uint32_t vocab_size, std::uint32_t kept, bool ragged, bool gold, std::size_t temperatures) {
    Layout layout;
    layout.codec = Codec::compact;
    layout.vocab_size = vocab_size;
    layout.kept = kept;
    layout.ragged = ragged;
    layout.gold = gold;
    for (std::size_t j = 0; j < temperatures; ++j) layout.temperatures.push_back(2.0 + static_cast<double>(j));
    return layout;
}

// Ids crowd near 0 with `skew` > 1; about one delta of `escapes` is large.
Given draw(Random& random, const Layout& layout, std::int64_t tokens, double skew = 3, unsigned escapes = 50) {
    Given rows(layout, tokens);
    const auto uniform = [&] { return static_cast<double>(random() >> 11) * 0x1p-53; };
    for (std::int64_t token = 0; token < tokens; ++token) {
        const auto t = static_cast<std::size_t>(token);
        const std::uint32_t most = std::min(layout.kept, layout.vocab_size);
        const std::uint32_t count = layout.ragged ? below(random, std::uint64_t{most} + 1) : layout.kept;
        rows.k_eff[t] = static_cast<std::uint16_t>(count);
        std::vector<std::uint32_t> had;
        std::uint32_t step = 0;
        for (std::uint32_t i = 0; i < count; ++i) {
            auto id = static_cast<std::uint32_t>(std::pow(uniform(), skew) * layout.vocab_size) % layout.vocab_size;
            while (std::find(had.begin(), had.end(), id) != had.end()) id = (id + 1) % layout.vocab_size;
            had.push_back(id);
            if (i > 0) {
                const std::uint32_t room = (1u << 24) - 1 - step;
                const std::uint32_t delta =
                    below(random, escapes) == 0 ? below(random, random() % 2 ? 300 : 1u << 23) : below(random, 5);
                step += std::min(delta, room);
            }
            rows.ids[t * layout.kept + i] = id;
            rows.steps[t * layout.kept + i] = step;
        }
        rows.top[t] = count == 0 ? 0.0f : -static_cast<float>(std::exp(6 * uniform() - 5));
        for (std::size_t j = 0; j < layout.temperatures.size(); ++j)
            rows.lse[j * static_cast<std::size_t>(tokens) + t] = static_cast<float>(8 * uniform() - 2);
        const float gold = random() % 3 ? -static_cast<float>(9 * uniform()) : -std::numeric_limits<float>::infinity();
        rows.gold[t] = layout.gold ? gold : 0.0f;
        if (!layout.ragged) rows.k_eff[t] = 0;
    }
    return rows;
}

Model learned(const std::vector<Given>& from, std::uint32_t vocab_size, std::size_t temperatures) {
    CompactLearner learner(vocab_size, temperatures);
    for (const Given& rows : from) learner.add(rows.layout, rows.source());
    return learner.learn(1 << 20);
}

Model after_file(const Model& model) { return parse_model(serialise(model), model.vocab_size, model.lse.size()); }

// What a decoder gives.
struct Decoded {
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> logprobs, lse, gold;

    // Poisoned, so that what decode does not write is seen.
    Decoded(const Layout& layout, std::int64_t tokens) {
        const auto n = static_cast<std::size_t>(tokens);
        ids.assign(n * layout.kept, -9);
        k_eff.assign(n, -9);
        logprobs.assign(n * layout.kept, std::nanf(""));
        lse.assign(n * layout.temperatures.size(), std::nanf(""));
        gold.assign(layout.gold ? n : 0, std::nanf(""));
    }
    Destination destination() {
        const auto n = static_cast<std::int64_t>(k_eff.size());
        return {.tokens = n,
                .ids = ids.data(),
                .logprobs = logprobs.data(),
                .lse = lse.data(),
                .lse_stride = n,
                .k_eff = k_eff.data(),
                .gold = gold.empty() ? nullptr : gold.data()};
    }
};

template <class Value>
bool same_bits(const std::vector<Value>& a, const std::vector<Value>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Value)) == 0);
}

// The tokens [first, first + count) of what went in.
Decoded expected(const Given& rows, std::int64_t first, std::int64_t count) {
    const Layout& layout = rows.layout;
    Decoded is(layout, count);
    for (std::size_t t = 0; t < static_cast<std::size_t>(count); ++t) {
        const std::size_t from = static_cast<std::size_t>(first) + t;
        const std::uint32_t k = layout.ragged ? rows.k_eff[from] : layout.kept;
        is.k_eff[t] = static_cast<std::int32_t>(k);
        for (std::uint32_t i = 0; i < layout.kept; ++i) {
            const std::size_t to = t * layout.kept + i, of = from * layout.kept + i;
            const double steps = std::ldexp(rows.steps[of], -static_cast<int>(layout.grid));
            is.ids[to] = i < k ? static_cast<std::int32_t>(rows.ids[of]) : -1;
            is.logprobs[to] =
                i < k ? static_cast<float>(rows.top[from] - steps) : -std::numeric_limits<float>::infinity();
        }
        for (std::size_t j = 0; j < layout.temperatures.size(); ++j)
            is.lse[j * static_cast<std::size_t>(count) + t] =
                rows.lse[j * static_cast<std::size_t>(rows.tokens) + from];
        if (layout.gold) is.gold[t] = rows.gold[from];
    }
    return is;
}

void check_same(const Decoded& got, const Decoded& is) {
    CHECK(same_bits(got.ids, is.ids));
    CHECK(same_bits(got.k_eff, is.k_eff));
    CHECK(same_bits(got.logprobs, is.logprobs));
    CHECK(same_bits(got.lse, is.lse));
    CHECK(same_bits(got.gold, is.gold));
}

// A block alone, and behind it what a decoder may load.
struct PaddedBlock {
    std::vector<std::byte> bytes;
    std::size_t size;

    PaddedBlock(std::vector<std::byte> block, std::byte behind) : bytes(std::move(block)), size(bytes.size()) {
        bytes.resize(size + padding_after_block, behind);
        bytes.shrink_to_fit();
    }
    std::span<const std::byte> block() const { return {bytes.data(), size}; }
};

PaddedBlock encoded(const Given& rows, const Model& model) {
    std::vector<std::byte> bytes;
    CompactEncoder(model).encode(rows.layout, rows.source(), bytes);
    return {std::move(bytes), std::byte{0xee}};
}

std::size_t round_trip(const Given& rows, const Model& model) {
    const CompactEncoder encoder(model);
    const CompactDecoder decoder(after_file(model));
    std::vector<std::byte> bytes(3);  // a block is appended to what there is
    encoder.encode(rows.layout, rows.source(), bytes);
    bytes.erase(bytes.begin(), bytes.begin() + 3);
    const PaddedBlock block(std::move(bytes), std::byte{0xee});
    CHECK_EQUAL(block.size % 8, 0u);
    const std::int64_t third = rows.tokens / 3;
    for_each_isa([&] {
        for (const auto& [first, count] :
             {std::pair{std::int64_t{0}, rows.tokens}, std::pair{third, (rows.tokens - third + 1) / 2}}) {
            const Scope scope(text(count, " from ", first));
            Decoded got(rows.layout, count);
            const DecodeRequest request{block.block(), rows.tokens, first, got.destination()};
            decoder.decode(rows.layout, {&request, 1});
            check_same(got, expected(rows, first, count));
        }
    });
    return block.size;
}

// Decodes bytes that may be anything. Whatever it does not refuse must be legal.
void survive(const CompactDecoder& decoder, const Layout& layout, std::vector<std::byte> bytes, std::int64_t tokens) {
    const PaddedBlock block(std::move(bytes), std::byte{0});
    std::vector<Decoded> all;
    std::string first_said;
    for_each_isa([&] {
        Decoded got(layout, tokens);
        const DecodeRequest request{block.block(), tokens, 0, got.destination()};
        std::string said = "nothing";
        try {
            decoder.decode(layout, {&request, 1});
        } catch (const Fault& fault) {
            CHECK(fault.code == Code::corrupt);
            said = "refused";
        }
        if (first_said.empty()) first_said = said;
        CHECK_EQUAL(said, first_said);
        if (said == "nothing") all.push_back(std::move(got));
    });
    for (const Decoded& got : all) {
        check_same(got, all.front());
        for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
            const auto count = static_cast<std::uint32_t>(got.k_eff[t]);
            CHECK(count <= layout.kept);
            if (count > layout.kept) return;
            for (std::uint32_t i = 0; i < count; ++i) {
                const std::size_t at = t * layout.kept + i;
                CHECK(static_cast<std::uint32_t>(got.ids[at]) < layout.vocab_size);
                CHECK(std::isfinite(got.logprobs[at]) && got.logprobs[at] <= 0);
                CHECK(i == 0 || got.logprobs[at] <= got.logprobs[at - 1]);
            }
        }
    }
}

void flip(Random& random, std::vector<std::byte>& bytes) {
    for (std::uint32_t flips = 1 + below(random, 3); flips > 0 && !bytes.empty(); --flips)
        bytes[below(random, bytes.size())] ^= static_cast<std::byte>(1u << below(random, 8));
}

}  // namespace

TEST(compact_round_trips) {
    for (const std::uint32_t vocab_size : {1u, 2u, 1000u, 128256u, 1u << 24})
        for (const std::uint32_t wanted : {1u, 5u, 64u, 300u})
            for (const bool ragged : {false, true}) {
                const std::uint32_t kept = ragged ? wanted : std::min(wanted, vocab_size);
                const std::size_t temperatures = random() % 3;
                const Layout layout = layout_of(vocab_size, kept, ragged, random() % 2, temperatures);
                const Scope scope(text("V ", vocab_size, " K ", kept, " ragged ", ragged, " T ", temperatures));
                const Model model = learned({draw(random, layout, 150)}, vocab_size, temperatures);
                for (const std::int64_t tokens : {1, 3, 4, 66}) round_trip(draw(random, layout, tokens), model);
            }
}

TEST(compact_blocks_are_decoded_together) {
    int refused = 0;
    for (int round = 0; round < 40; ++round) {
        const std::uint32_t vocab_size = round % 2 ? 300 : 128256;
        const std::uint32_t kept = 1 + below(random, round % 5 ? 100 : 5);
        const Layout layout = layout_of(vocab_size, kept, random() % 2, random() % 2, random() % 3);
        const Model model = learned({draw(random, layout, 150)}, vocab_size, layout.temperatures.size());
        const CompactDecoder decoder(model);
        const std::size_t count = 1 + below(random, most_together);
        std::vector<Given> rows;
        std::vector<PaddedBlock> blocks;
        std::vector<std::pair<std::int64_t, std::int64_t>> wanted;
        for (std::size_t b = 0; b < count; ++b) {
            const std::int64_t tokens = 1 + below(random, 70),
                               first = below(random, static_cast<std::uint64_t>(tokens));
            rows.push_back(draw(random, layout, tokens, 3, random() % 2 ? 50 : 3));
            blocks.push_back(encoded(rows.back(), model));
            wanted.emplace_back(first, below(random, static_cast<std::uint64_t>(tokens - first) + 1));
        }
        for_each_isa([&] {
            std::vector<Decoded> got;
            std::vector<DecodeRequest> requests;
            for (const auto& [first, tokens] : wanted) got.emplace_back(layout, tokens);
            for (std::size_t b = 0; b < count; ++b)
                requests.push_back({blocks[b].block(), rows[b].tokens, wanted[b].first, got[b].destination()});
            decoder.decode(layout, requests);
            for (std::size_t b = 0; b < count; ++b)
                check_same(got[b], expected(rows[b], wanted[b].first, wanted[b].second));
            // One of them lacks the last word of its first lane, which the second has in front.
            std::vector<std::byte> moved = blocks[count - 1].bytes;
            moved.resize(blocks[count - 1].size);
            std::array<std::uint32_t, 2> words{};
            std::memcpy(words.data(), moved.data(), sizeof words);
            if (words[0] == 0) return;
            --words[0];
            ++words[1];
            std::memcpy(moved.data(), words.data(), sizeof words);
            const PaddedBlock hostile(std::move(moved), std::byte{0});
            Decoded all(layout, rows[count - 1].tokens);
            requests.back() = {hostile.block(), rows[count - 1].tokens, 0, all.destination()};
            CHECK_THROWS(Fault, decoder.decode(layout, requests));
            ++refused;
        });
        std::vector<DecodeRequest> many(most_together + 1);
        CHECK_THROWS(ArgumentError, decoder.decode(layout, many));
    }
    CHECK(refused > 0);
}

TEST(compact_takes_what_its_model_has_never_seen) {
    for (const std::uint32_t vocab_size : {1000u, 128256u, 1u << 24}) {
        const Scope scope(text("V ", vocab_size));
        const Layout seen = layout_of(vocab_size, 20, false, false, 1),
                     other = layout_of(vocab_size, 64, true, true, 1);
        const Model nothing = learned({}, vocab_size, 1);
        const Model small = learned({draw(random, seen, 200, 8, 100000)}, vocab_size, 1);
        for (const Model* model : {&nothing, &small}) {
            round_trip(draw(random, other, 64, 1, 3), *model);
            round_trip(draw(random, seen, 64, 1, 2), *model);
        }
    }
}

TEST(compact_classes_are_worth_their_bytes) {
    // Rows of two kinds, whose ids are disjoint: telling them apart saves a bit an id, and the token's choice costs
    // one.
    const Layout layout = layout_of(128256, 64, false, false, 0);
    const auto two_kinds = [&] {
        Given rows = draw(random, layout, 256, 1);
        for (std::size_t j = 0; j < rows.ids.size(); ++j)
            rows.ids[j] = static_cast<std::uint32_t>((j / layout.kept) % 2 * 60000 + (j * 5 + random() % 5) % 320);
        return rows;
    };
    std::vector<Given> from;
    for (int j = 0; j < 8; ++j) from.push_back(two_kinds());
    Model model = learned(from, layout.vocab_size, 0);
    CHECK(model.ids.size() > 1);
    const std::size_t size = round_trip(two_kinds(), model);
    CHECK(static_cast<double>(size) < 256 * 64 * (8.6 + 2.6) / 8 + 256 * 4);
}

TEST(compact_bytes_are_determined) {
    const Layout layout = layout_of(1000, 16, true, true, 1);
    const Given rows = draw(random, layout, 100);
    const Model a = learned({rows}, 1000, 1), b = learned({rows}, 1000, 1);
    CHECK(serialise(a) == serialise(b));
    CHECK(serialise(after_file(a)) == serialise(a));
    std::vector<std::byte> x, y;
    CompactEncoder(a).encode(layout, rows.source(), x);
    CompactEncoder(after_file(a)).encode(layout, rows.source(), y);
    CHECK(x == y);
}

TEST(compact_encoder_refuses) {
    const Layout layout = layout_of(1000, 8, true, true, 1);
    const Given good = draw(random, layout, 20);
    const CompactEncoder encoder(learned({good}, 1000, 1));
    std::vector<std::byte> out;
    const auto with = [&](auto change) {
        Given bad = good;
        bad.k_eff[7] = 8;
        for (std::uint32_t i = 0; i < 8; ++i) bad.ids[7 * 8 + i] = bad.steps[7 * 8 + i] = i;
        bad.top[7] = -1;
        encoder.encode(layout, bad.source(), out);
        out.clear();
        change(bad);
        CHECK_THROWS(ArgumentError, encoder.encode(layout, bad.source(), out));
        CHECK(out.empty());
    };
    const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
    with([](Given& r) { r.ids[7 * 8 + 7] = 1000; });
    with([](Given& r) { r.steps[7 * 8 + 7] = 1 << 24; });
    with([](Given& r) { r.steps[7 * 8 + 3] = 1; });
    with([](Given& r) { r.steps[7 * 8] = 1; });
    with([](Given& r) { r.k_eff[7] = 9; });
    with([](Given& r) { r.k_eff[7] = 0; });  // its top is not 0
    for (const float value : {nan, -inf, 1.0f}) with([=](Given& r) { r.top[7] = value; });
    for (const float value : {nan, -inf, inf}) with([=](Given& r) { r.lse[7] = value; });
    for (const float value : {nan, 1.0f}) with([=](Given& r) { r.gold[7] = value; });
    CHECK_THROWS(ArgumentError, encoder.encode(layout_of(1001, 8, true, true, 1), good.source(), out));
    CHECK_THROWS(ArgumentError, encoder.encode(layout_of(1000, 8, true, true, 0), good.source(), out));

    Model holes = learned({good}, 1000, 1);
    holes.top = {{7, 1u << precision, static_cast<std::uint8_t>(float_raw)}};
    CHECK_THROWS(ArgumentError, CompactEncoder{holes});
}

TEST(compact_blocks_may_be_hostile) {
    for (int round = 0; round < 60; ++round) {
        const std::uint32_t vocab_size = round % 2 ? 300 : 128256;
        const Layout layout = layout_of(vocab_size, 1 + below(random, 40), random() % 2, random() % 2, random() % 2);
        const std::int64_t tokens = 1 + below(random, 40);
        const Given rows = draw(random, layout, tokens);
        const Model model = learned({rows}, vocab_size, layout.temperatures.size());
        const CompactDecoder decoder(model);
        std::vector<std::byte> good;
        CompactEncoder(model).encode(layout, rows.source(), good);
        for (int change = 0; change < 40; ++change) {
            std::vector<std::byte> bad = good;
            flip(random, bad);
            survive(decoder, layout, bad, tokens);
            bad = good;
            bad.resize(below(random, good.size() + 16));
            survive(decoder, layout, bad, tokens);
            for (std::byte& b : bad) b = static_cast<std::byte>(random());
            const std::size_t keep = std::min<std::size_t>(bad.size(), 16);  // the lanes' lengths, so that it goes on
            std::copy_n(good.begin(), keep, bad.begin());
            bad.resize(good.size());
            survive(decoder, layout, bad, tokens);
            survive(decoder, layout, good, 1 + below(random, 64));
        }
    }
}

TEST(compact_models_may_be_hostile) {
    int parsed = 0;
    for (int round = 0; round < 40; ++round) {
        const std::uint32_t vocab_size = round % 2 ? 300 : 128256;
        const Layout layout = layout_of(vocab_size, 1 + below(random, 40), true, random() % 2, random() % 2);
        const Given rows = draw(random, layout, 40);
        const Model model = learned({rows}, vocab_size, layout.temperatures.size());
        std::vector<std::byte> block;
        CompactEncoder(model).encode(layout, rows.source(), block);
        const std::vector<std::byte> good = serialise(model);
        for (int change = 0; change < 40; ++change) {
            std::vector<std::byte> bad = good;
            if (change % 4 == 0)
                bad.resize(below(random, good.size()));
            else if (change % 4 == 1)  // the listed ids are most of the bytes; what follows is what has a structure
                bad[bad.size() - 1 - below(random, std::min<std::size_t>(bad.size(), 300))] ^= std::byte{1};
            else
                flip(random, bad);
            try {
                const Model other = parse_model(bad, vocab_size, layout.temperatures.size());
                ++parsed;
                survive(CompactDecoder(other), layout, block, rows.tokens);
                CHECK(serialise(other) == bad);
            } catch (const Fault& fault) {
                CHECK(fault.code == Code::corrupt || fault.code == Code::version || fault.code == Code::mismatch);
            }
        }
    }
    CHECK(parsed > 0);
}
