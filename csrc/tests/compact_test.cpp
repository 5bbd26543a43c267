// The compact tier: what goes in comes out, whatever the model has seen, and hostile bytes end in a Fault or in values
// that are legal.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cache/compact/learn.h"
#include "cache/fault.h"
#include "core/error.h"
#include "harness.h"

using namespace kdfast;
using namespace kdfast::cache;
using namespace kdfast::test;

namespace {

std::uint32_t below(Random& random, std::uint64_t limit) { return static_cast<std::uint32_t>(random() % limit); }

// Rows that own their numbers.
struct Rows {
    Layout layout;
    std::int64_t tokens = 0;
    std::vector<std::uint32_t> ids, steps;
    std::vector<float> top, lse, gold;
    std::vector<std::uint16_t> k_eff;

    Rows(const Layout& of, std::int64_t count) : layout(of), tokens(count) {
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
    QuantisedDestination destination() {
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
Rows draw(Random& random, const Layout& layout, std::int64_t tokens, double skew = 3, unsigned escapes = 50) {
    Rows rows(layout, tokens);
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

Model learned(const std::vector<Rows>& from, std::uint32_t vocab_size, std::size_t temperatures) {
    CompactLearner learner(vocab_size, temperatures);
    for (const Rows& rows : from) learner.add(rows.layout, rows.source());
    return learner.learn(1 << 20);
}

Model after_file(const Model& model) { return parse_model(serialise(model), model.vocab_size, model.lse.size()); }

template <class Value>
bool same_bits(const std::vector<Value>& a, const std::vector<Value>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Value)) == 0);
}

// Poisoned, so that what decode does not write is seen.
Rows poisoned(const Layout& layout, std::int64_t tokens) {
    Rows rows(layout, tokens);
    std::fill(rows.ids.begin(), rows.ids.end(), 0xdeadbeefu);
    std::fill(rows.steps.begin(), rows.steps.end(), 0xdeadbeefu);
    for (std::vector<float>* one : {&rows.top, &rows.lse}) std::fill(one->begin(), one->end(), std::nanf(""));
    return rows;
}

std::size_t round_trip(const Rows& rows, const Model& model) {
    const CompactEncoder encoder(model);
    const CompactDecoder decoder(after_file(model));
    std::vector<std::byte> bytes(3);  // a block is appended to what there is
    encoder.encode(rows.layout, rows.source(), bytes);
    bytes.erase(bytes.begin(), bytes.begin() + 3);
    const std::size_t size = bytes.size();
    CHECK_EQUAL(size % 8, 0u);
    bytes.resize(size + padding_after_block, std::byte{0xee});
    Rows got = poisoned(rows.layout, rows.tokens);
    decoder.decode(rows.layout, {bytes.data(), size}, rows.tokens, 0, got.destination());
    CHECK(same_bits(got.ids, rows.ids));
    CHECK(same_bits(got.steps, rows.steps));
    CHECK(same_bits(got.top, rows.top));
    CHECK(same_bits(got.lse, rows.lse));
    if (rows.layout.gold) CHECK(same_bits(got.gold, rows.gold));
    if (rows.layout.ragged) CHECK(same_bits(got.k_eff, rows.k_eff));

    const std::int64_t first = rows.tokens / 3, count = (rows.tokens - first + 1) / 2;
    Rows part = poisoned(rows.layout, count);
    decoder.decode(rows.layout, {bytes.data(), size}, rows.tokens, first, part.destination());
    const auto from = static_cast<std::size_t>(first) * rows.layout.kept;
    CHECK(std::equal(part.ids.begin(), part.ids.end(), rows.ids.begin() + static_cast<std::ptrdiff_t>(from)));
    CHECK(std::equal(part.steps.begin(), part.steps.end(), rows.steps.begin() + static_cast<std::ptrdiff_t>(from)));
    return size;
}

// Decodes bytes that may be anything. Whatever it does not refuse must be legal.
void survive(const CompactDecoder& decoder, const Layout& layout, std::vector<std::byte> bytes, std::int64_t tokens) {
    const std::size_t size = bytes.size();
    bytes.resize(size + padding_after_block);
    bytes.shrink_to_fit();
    Rows got(layout, tokens);
    try {
        decoder.decode(layout, {bytes.data(), size}, tokens, 0, got.destination());
    } catch (const Fault& fault) {
        CHECK(fault.code == Code::corrupt);
        return;
    }
    for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
        const std::uint32_t count = layout.ragged ? got.k_eff[t] : layout.kept;
        CHECK(count <= layout.kept && std::isfinite(got.top[t]) && got.top[t] <= 0);
        if (count > layout.kept) return;
        for (std::uint32_t i = 0; i < count; ++i) CHECK(got.ids[t * layout.kept + i] < layout.vocab_size);
        for (std::uint32_t i = 1; i < count; ++i) {
            const std::size_t at = t * layout.kept + i;
            CHECK(got.steps[at] >= got.steps[at - 1] && got.steps[at] < 1u << 24);
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
        Rows rows = draw(random, layout, 256, 1);
        for (std::size_t j = 0; j < rows.ids.size(); ++j)
            rows.ids[j] = static_cast<std::uint32_t>((j / layout.kept) % 2 * 60000 + (j * 5 + random() % 5) % 320);
        return rows;
    };
    std::vector<Rows> from;
    for (int j = 0; j < 8; ++j) from.push_back(two_kinds());
    Model model = learned(from, layout.vocab_size, 0);
    CHECK(model.ids.size() > 1);
    const std::size_t size = round_trip(two_kinds(), model);
    CHECK(static_cast<double>(size) < 256 * 64 * (8.6 + 2.6) / 8 + 256 * 4);
}

TEST(compact_bytes_are_determined) {
    const Layout layout = layout_of(1000, 16, true, true, 1);
    const Rows rows = draw(random, layout, 100);
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
    const Rows good = draw(random, layout, 20);
    const CompactEncoder encoder(learned({good}, 1000, 1));
    std::vector<std::byte> out;
    const auto with = [&](auto change) {
        Rows bad = good;
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
    with([](Rows& r) { r.ids[7 * 8 + 7] = 1000; });
    with([](Rows& r) { r.steps[7 * 8 + 7] = 1 << 24; });
    with([](Rows& r) { r.steps[7 * 8 + 3] = 1; });
    with([](Rows& r) { r.steps[7 * 8] = 1; });
    with([](Rows& r) { r.k_eff[7] = 9; });
    with([](Rows& r) { r.k_eff[7] = 0; });  // its top is not 0
    for (const float value : {nan, -inf, 1.0f}) with([=](Rows& r) { r.top[7] = value; });
    for (const float value : {nan, -inf, inf}) with([=](Rows& r) { r.lse[7] = value; });
    for (const float value : {nan, 1.0f}) with([=](Rows& r) { r.gold[7] = value; });
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
        const Rows rows = draw(random, layout, tokens);
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
        const Rows rows = draw(random, layout, 40);
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
