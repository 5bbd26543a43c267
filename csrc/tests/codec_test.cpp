// Blocks of every ISA against a plain decoder of the format, and against what was encoded.
#include "cache/codec.h"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <set>
#include <string>

#include "cache/fault.h"
#include "cache/kernels.h"
#include "codec_plain.h"
#include "core/error.h"
#include "cpu/dispatch.h"
#include "harness.h"
#include "isas.h"

using namespace kdfast;
using namespace kdfast::cache;
using namespace kdfast::test;

namespace {

using Block = std::vector<std::byte>;

double uniform(Random& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }
std::size_t below(Random& random, std::size_t n) { return random() % n; }

// What is encoded; NaN and ids out of range stand where nobody looks.
struct Case {
    Layout layout;
    std::size_t n = 0;
    Decoded is;

    Source source() const {
        Source s;
        s.tokens = static_cast<std::int64_t>(n);
        s.ids = is.ids.data();
        s.logprobs = is.logprobs.data();
        s.mass = is.mass.data();
        s.lse = is.lse.data();
        s.lse_stride = s.tokens;
        s.k_eff = layout.ragged ? is.k_eff.data() : nullptr;
        s.gold = is.gold.data();
        s.neg_entropy = is.neg_entropy.data();
        return s;
    }
    Block encoded() const {
        Block out;
        check(layout, source());
        encode(layout, source(), out);
        return out;
    }
    std::size_t k(std::size_t i) const { return static_cast<std::size_t>(is.k_eff[i]); }
    std::string name() const {
        return text("codec ", static_cast<int>(layout.codec), " method ", static_cast<int>(layout.method), " V ",
                    layout.vocab_size, " K ", layout.kept, " grid ", layout.grid, " N ", layout.draws, " ragged ",
                    layout.ragged, " gold ", layout.gold, " temperatures ", layout.temperatures.size() + 1, " tokens ",
                    n);
    }
};

std::vector<std::int32_t> distinct_ids(Random& random, std::size_t k, std::uint32_t vocab_size) {
    std::set<std::int32_t> ids;
    while (ids.size() < k) ids.insert(static_cast<std::int32_t>(below(random, vocab_size)));
    std::vector<std::int32_t> out(ids.begin(), ids.end());
    std::shuffle(out.begin(), out.end(), random);
    return out;
}

// Gaps of every size that is coded in a way of its own, in steps: none, below 15, an escape, a long one.
double gap(Random& random, int kind) {
    const double u = uniform(random);
    switch (kind == 2 ? below(random, 40) : 39) {
        case 0:
            return 269 + 2 * u;
        case 1:
            return 5000 * u;
        case 2:
            return 250 + 30 * u;
        default:
            return kind == 0 ? -2 * std::log(1 - u) : 30 * u * u;
    }
}

Case make(Random& random, Layout layout, std::size_t n, int kind = 0) {
    Case c;
    layout.kept = std::min(layout.kept, layout.vocab_size);
    if (layout.method == Method::sample) layout.draws = std::max(layout.draws, static_cast<double>(layout.kept));
    c.layout = layout;
    c.n = n;
    const std::size_t K = layout.kept;
    Decoded& is = c.is;
    is.ids.assign(n * K, -7);
    (layout.codec == Codec::drawn ? is.mass : is.logprobs).assign(n * K, NAN);
    is.lse.resize(layout.temperatures.size() * n);
    for (std::size_t i = 0; i < n; ++i) {
        const std::size_t k = !layout.ragged || below(random, 4) == 0 ? K : below(random, K + 1);
        is.k_eff.push_back(static_cast<std::int32_t>(k));
        const std::vector<std::int32_t> ids = distinct_ids(random, k, layout.vocab_size);
        std::copy(ids.begin(), ids.end(), is.ids.begin() + static_cast<std::ptrdiff_t>(i * K));
        if (layout.gold)
            is.gold.push_back(below(random, 9) == 0 ? -INFINITY : static_cast<float>(-9 * uniform(random)));
        if (layout.codec == Codec::drawn) {
            is.neg_entropy.push_back(static_cast<float>(-5 * uniform(random)));
            std::sort(is.ids.begin() + static_cast<std::ptrdiff_t>(i * K),
                      is.ids.begin() + static_cast<std::ptrdiff_t>(i * K + k));
            double left = layout.draws - static_cast<double>(k);  // beyond one for each entry
            for (std::size_t j = 0; j < k; ++j) {
                if (layout.method == Method::pps) {
                    is.mass[i * K + j] =
                        static_cast<float>(below(random, 2) ? 0.01 : 0.01 * std::exp(4 * uniform(random)));
                    continue;
                }
                const double more = below(random, 3) || left < 1
                                        ? 0
                                        : static_cast<double>(below(random, static_cast<std::size_t>(left) + 1));
                left -= more;
                is.mass[i * K + j] = static_cast<float>((1 + more) / layout.draws);
            }
            for (std::size_t t = 0; t < layout.temperatures.size(); ++t)
                is.lse[t * n + i] = static_cast<float>(uniform(random) * 8);
            continue;
        }
        std::vector<double> l;
        double sum = 0;
        for (std::size_t j = 0; j < k; ++j) {
            l.push_back(j == 0 ? 0 : l.back() - std::ldexp(gap(random, kind), -static_cast<int>(layout.grid)));
            sum += std::exp(l.back());
        }
        const double tail = std::pow(10, -7 * uniform(random)), top = std::log1p(-tail) - std::log(sum);
        for (std::size_t j = 0; j < k; ++j) is.logprobs[i * K + j] = static_cast<float>(std::min(0.0, top + l[j]));
        for (std::size_t t = 0; t < layout.temperatures.size(); ++t) {
            double powers = tail;
            for (std::size_t j = 0; j < k; ++j) powers += std::exp(is.logprobs[i * K + j] / layout.temperatures[t]);
            is.lse[t * n + i] = static_cast<float>(std::log(powers));
        }
    }
    return c;
}

// Rows are in order, ties by their ids: what encoding leaves as it is.
void order_ties(Case& c) {
    const std::size_t K = c.layout.kept;
    for (std::size_t i = 0; i < c.n && c.layout.codec == Codec::fixed; ++i) {
        std::int32_t* ids = c.is.ids.data() + i * K;
        const float* logprobs = c.is.logprobs.data() + i * K;
        for (std::size_t from = 0, to = 0; from < c.k(i); from = to) {
            while (to < c.k(i) && logprobs[to] == logprobs[from]) ++to;
            std::sort(ids + from, ids + to);
        }
    }
}

// A block in memory of its own, behind which nothing but what may be loaded is.
Decoded decoded(const Layout& layout, std::span<const std::byte> block, std::size_t n, std::size_t first,
                std::size_t count) {
    const auto memory = std::make_unique<std::byte[]>(block.size() + padding_after_block);
    std::copy(block.begin(), block.end(), memory.get());
    std::fill_n(memory.get() + block.size(), padding_after_block, std::byte{0xFF});
    Decoded got;
    Destination out;
    out.tokens = static_cast<std::int64_t>(count);
    const auto room = [](auto& field, std::size_t size, auto poison) {
        field.assign(size, poison);
        field.shrink_to_fit();
        return field.data();
    };
    out.ids = room(got.ids, count * layout.kept, -9);
    if (layout.codec == Codec::drawn) {
        out.mass = room(got.mass, count * layout.kept, NAN);
        out.neg_entropy = room(got.neg_entropy, count, NAN);
    } else {
        out.logprobs = room(got.logprobs, count * layout.kept, NAN);
    }
    out.lse = room(got.lse, count * layout.temperatures.size(), NAN);
    out.lse_stride = out.tokens;
    out.k_eff = room(got.k_eff, count, -9);
    if (layout.gold) out.gold = room(got.gold, count, NAN);
    decode(layout, {{memory.get(), block.size()}, static_cast<std::int64_t>(n), static_cast<std::int64_t>(first), out});
    return got;
}

// Every ISA gives what the plain decoder gives, of the block and of parts of it.
void check_decode(Random& random, const Case& c, const Block& block, std::size_t parts) {
    CHECK_EQUAL(block.size() % 8, 0u);
    const Decoded expected = plain_decode(c.layout, block, c.n);
    for_each_isa([&] {
        CHECK(decoded(c.layout, block, c.n, 0, c.n) == expected);
        for (std::size_t part = 0; part < parts; ++part) {
            const std::size_t first = below(random, c.n + 1), count = below(random, c.n - first + 1);
            const Scope scope(text(count, " from ", first));
            CHECK(decoded(c.layout, block, c.n, first, count) == expected.part(first, count, c.n));
        }
    });
}

Layout fixed_layout(std::uint32_t vocab_size, std::uint32_t kept, std::uint32_t grid = 4) {
    Layout layout;
    layout.vocab_size = vocab_size;
    layout.kept = kept;
    layout.grid = grid;
    layout.temperatures = {2};
    return layout;
}
Layout drawn_layout(Method method, std::uint32_t vocab_size, std::uint32_t kept, double draws) {
    Layout layout = fixed_layout(vocab_size, kept);
    layout.codec = Codec::drawn;
    layout.method = method;
    layout.draws = draws;
    return layout;
}

Layout any_layout(Random& random) {
    constexpr std::uint32_t vocabularies[] = {1, 2, 3, 255, 256, 257, 32000, 128256, 151936, 1u << 24};
    constexpr std::uint32_t widths[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 300};
    const auto vocab_size = vocabularies[below(random, std::size(vocabularies))];
    const auto kept = widths[below(random, std::size(widths))];
    Layout layout = below(random, 3)
                        ? fixed_layout(vocab_size, kept, 2 + static_cast<std::uint32_t>(below(random, 9)))
                        : drawn_layout(below(random, 2) ? Method::sample : Method::pps, vocab_size, kept, 50);
    layout.ragged = below(random, 2);
    layout.gold = below(random, 2);
    layout.temperatures.clear();
    for (std::size_t t = below(random, 3); t > 0; --t) layout.temperatures.push_back(2.5 / static_cast<double>(t));
    return layout;
}

// What is kept of the distribution at a temperature.
double kept_mass(const Decoded& d, std::size_t i, std::size_t K, double temperature, double lse) {
    double sum = 0;
    for (std::size_t j = 0; j < static_cast<std::size_t>(d.k_eff[i]); ++j)
        sum += std::exp(d.logprobs[i * K + j] / temperature - lse);
    return sum;
}

}  // namespace

TEST(blocks_of_every_layout) {
    for (int round = 0; round < 150; ++round) {
        constexpr std::size_t tokens[] = {1, 2, 7, 64, 128, 256};
        const Layout layout = any_layout(random);
        const std::size_t n = tokens[below(random, layout.kept > 100 ? 3 : std::size(tokens))];
        const Case c = make(random, layout, n, static_cast<int>(below(random, 3)));
        const Scope scope(c.name());
        check_decode(random, c, c.encoded(), 4);
    }
}

TEST(blocks_in_every_part) {
    for (const bool ragged : {false, true})
        for (const int kind : {0, 2}) {
            Layout layout = fixed_layout(128256, 33);
            layout.ragged = ragged;
            const Case c = make(random, layout, 9, kind);
            const Block block = c.encoded();
            const Decoded expected = plain_decode(c.layout, block, c.n);
            for_each_isa([&] {
                for (std::size_t first = 0; first <= c.n; ++first)
                    for (std::size_t count = 0; first + count <= c.n; ++count)
                        CHECK(decoded(c.layout, block, c.n, first, count) == expected.part(first, count, c.n));
            });
        }
}

TEST(blocks_of_the_widest_rows) {
    for (const Method method : {Method::topk, Method::sample}) {
        Layout layout =
            method == Method::topk ? fixed_layout(1u << 24, 65535) : drawn_layout(method, 1u << 24, 65535, 3);
        const Case c = make(random, layout, 2, 2);
        check_decode(random, c, c.encoded(), 2);
    }
}

TEST(fixed_rounds_to_the_nearest_step_and_keeps_the_mass) {
    for (const std::uint32_t grid : {2u, 4u, 10u}) {
        Layout layout = fixed_layout(128256, 64, grid);
        layout.temperatures = {0.5, 2, 4};
        Case c = make(random, layout, 128);
        order_ties(c);
        for_each_isa([&] {
            const Decoded got = decoded(c.layout, c.encoded(), c.n, 0, c.n);
            CHECK(got.ids == c.is.ids);
            const double step = std::ldexp(1.0, -static_cast<int>(grid));
            for (std::size_t i = 0; i < c.n; ++i) {
                const Scope scope(text("grid ", grid, ", token ", i));
                const float *in = c.is.logprobs.data() + i * 64, *out = got.logprobs.data() + i * 64;
                for (std::size_t j = 1; j < 64; ++j)
                    CHECK_NEAR(double{out[j]} - out[0], double{in[j]} - in[0], step / 2 + 4e-7 * std::abs(out[j]));
                // f32 places every log-probability within 2^-24 of itself.
                const double rounding = 64 * 6e-8;
                CHECK_NEAR(kept_mass(got, i, 64, 1, 0), kept_mass(c.is, i, 64, 1, 0), rounding);
                for (std::size_t t = 0; t < 3; ++t) {
                    const double T = layout.temperatures[t];
                    CHECK_NEAR(kept_mass(got, i, 64, T, got.lse[t * c.n + i]),
                               kept_mass(c.is, i, 64, T, c.is.lse[t * c.n + i]), rounding);
                }
            }
        });
    }
}

TEST(fixed_keeps_a_tail_of_one_in_ten_million) {
    // An entry with nearly all of the mass: its logarithm is as small as the tail, and has all its digits.
    Case c = make(random, fixed_layout(1000, 3), 1);
    const double rest[] = {3.1e-8, 1.7e-8}, tail = 1e-7;
    c.is.logprobs = {static_cast<float>(std::log1p(-tail - rest[0] - rest[1])), static_cast<float>(std::log(rest[0])),
                     static_cast<float>(std::log(rest[1]))};
    for_each_isa([&] {
        const Decoded got = decoded(c.layout, c.encoded(), 1, 0, 1);
        const double others = std::exp(double{got.logprobs[1]}) + std::exp(double{got.logprobs[2]});
        CHECK_NEAR(-std::expm1(double{got.logprobs[0]}) - others, tail, 1e-12);
    });
}

TEST(encoding_sorts_rows) {
    for (int round = 0; round < 20; ++round) {
        Layout layout =
            round % 2 ? fixed_layout(500, 40) : drawn_layout(round % 4 ? Method::sample : Method::pps, 500, 40, 30);
        layout.ragged = true;
        Case c = make(random, layout, 5);
        for (float& x : c.is.logprobs) x = std::floor(x);  // ties
        order_ties(c);
        const Block expected = c.encoded();
        CHECK(plain_decode(c.layout, expected, c.n).ids.size() == c.is.ids.size());
        for (std::size_t i = 0; i < c.n; ++i) {
            std::vector<std::size_t> order(c.k(i));
            std::iota(order.begin(), order.end(), std::size_t{0});
            std::shuffle(order.begin(), order.end(), random);
            const Decoded from = c.is;
            for (std::size_t j = 0; j < order.size(); ++j) {
                c.is.ids[i * 40 + j] = from.ids[i * 40 + order[j]];
                for (auto field : {&Decoded::logprobs, &Decoded::mass})
                    if (!(c.is.*field).empty()) (c.is.*field)[i * 40 + j] = (from.*field)[i * 40 + order[j]];
            }
        }
        CHECK(c.encoded() == expected);
    }
}

TEST(encoding_is_the_same_on_every_isa) {
    for (int round = 0; round < 10; ++round) {
        const Case c = make(random, any_layout(random), 20, 2);
        const Scope scope(c.name());
        const Block expected = c.encoded();
        for_each_isa([&] { CHECK(c.encoded() == expected); });
    }
}

TEST(drawn_gives_back_what_was_drawn) {
    for (const Method method : {Method::sample, Method::pps}) {
        const Case c = make(random, drawn_layout(method, 128256, 20, 50), 128);
        const Decoded got = decoded(c.layout, c.encoded(), c.n, 0, c.n);
        CHECK(got.ids == c.is.ids);
        if (method == Method::sample) CHECK(got == c.is);
        for (std::size_t i = 0; i < got.mass.size(); ++i)
            CHECK_NEAR(std::log(got.mass[i]), std::log(c.is.mass[i]), 0x1p-5 + 1e-6);
    }
}

TEST(drawn_chooses_the_fewest_bits) {
    for (int round = 0; round < 20; ++round) {
        const auto vocab_size = static_cast<std::uint32_t>(1 + below(random, std::size_t{1} << (1 + round)));
        const Case c = make(random, drawn_layout(Method::sample, vocab_size, 20, round % 5 ? 30 : 100000), 30);
        const Scope scope(c.name());
        const Block block = c.encoded();
        const auto golomb = [](std::uint64_t w, unsigned order) {
            std::uint64_t bits = order + 1;
            for (std::uint64_t h = (w >> order) + 1; h > 1; h /= 2) bits += 2;
            return bits;
        };
        std::uint64_t fewest[2] = {UINT64_MAX, UINT64_MAX}, entries = 0;
        for (unsigned order = 0; order < 24; ++order) {
            std::uint64_t gaps = 0, values = 0;
            entries = 0;
            for (std::size_t i = 0; i < c.n; ++i)
                for (std::size_t j = 0, K = c.layout.kept; j < c.k(i); ++j, ++entries) {
                    const std::int32_t previous = j == 0 ? -1 : c.is.ids[i * K + j - 1];
                    gaps += golomb(static_cast<std::uint64_t>(c.is.ids[i * K + j] - previous - 1), order);
                    const std::int64_t value = std::llround(c.is.mass[i * K + j] * c.layout.draws) - 1;
                    if (value > 0) values += golomb(static_cast<std::uint64_t>(value) - 1, order);
                }
            fewest[0] = std::min(fewest[0], gaps);
            fewest[1] = std::min(fewest[1], values);
        }
        const std::uint64_t bytes = 30 * 8 + 2 + (fewest[0] + fewest[1] + entries + 7) / 8;
        CHECK_EQUAL(block.size(), (bytes + 7) / 8 * 8);
    }
}

TEST(encoding_refuses_what_the_format_cannot_hold) {
    const auto refused = [&](const Case& from, auto change) {
        Case c = from;
        change(c);
        Block out(3, std::byte{7});
        CHECK_THROWS(ArgumentError, (check(c.layout, c.source()), encode(c.layout, c.source(), out)));
        CHECK_EQUAL(out.size(), 3u);
    };
    Layout layout = fixed_layout(1000, 8);
    layout.ragged = layout.gold = true;
    Case fixed = make(random, layout, 4);
    fixed.is.k_eff[2] = 5;
    for (std::size_t j = 0; j < 5; ++j) {
        fixed.is.ids[16 + j] = static_cast<std::int32_t>(100 + j);
        fixed.is.logprobs[16 + j] = -2 - static_cast<float>(j);
    }
    for (std::size_t t = 0; t < fixed.layout.temperatures.size(); ++t) fixed.is.lse[t * fixed.n + 2] = 4;
    static_cast<void>(fixed.encoded());
    for (const float x : {0.5f, NAN, INFINITY, -INFINITY}) refused(fixed, [x](Case& c) { c.is.logprobs[18] = x; });
    refused(fixed, [](Case& c) { c.is.logprobs[20] = -1.1e6f; });  // 2^24 steps below
    for (const int id : {-1, 1000, INT32_MIN, INT32_MAX, 100}) refused(fixed, [id](Case& c) { c.is.ids[18] = id; });
    for (const int k : {-1, 9}) refused(fixed, [k](Case& c) { c.is.k_eff[1] = k; });
    for (const float x : {0.5f, NAN}) refused(fixed, [x](Case& c) { c.is.gold[1] = x; });
    for (const float x : {INFINITY, NAN}) refused(fixed, [x](Case& c) { c.is.lse[1] = x; });
    refused(fixed, [](Case& c) { c.layout.grid = 11; });
    refused(fixed, [](Case& c) { c.layout.method = Method::pps; });
    refused(fixed, [](Case& c) { c.layout.codec = Codec::compact; });
    refused(fixed, [](Case& c) { c.n = 0; });

    Case drawn = make(random, drawn_layout(Method::sample, 1000, 8, 50), 4);
    for (std::size_t j = 0; j < 32; ++j) drawn.is.ids[j] = static_cast<std::int32_t>(10 * j);
    static_cast<void>(drawn.encoded());
    for (const float x : {0.0f, -0.02f, 0.03f, 1.02f, NAN, INFINITY})
        refused(drawn, [x](Case& c) { c.is.mass[9] = x; });
    for (const int id : {-1, 1000, 100}) refused(drawn, [id](Case& c) { c.is.ids[9] = id; });
    for (const float x : {0.5f, NAN, -INFINITY}) refused(drawn, [x](Case& c) { c.is.neg_entropy[1] = x; });
    for (const double n : {0.0, -1.0, 2.5, static_cast<double>(NAN)})
        refused(drawn, [n](Case& c) { c.layout.draws = n; });
}

TEST(decoding_refuses_tokens_that_are_not_there) {
    const Case c = make(random, fixed_layout(1000, 8), 4);
    const Block block = c.encoded();
    CHECK_THROWS(ArgumentError, decoded(c.layout, block, 4, 1, 4));
    CHECK_THROWS(ArgumentError, decoded(c.layout, block, 4, 5, 0));
    CHECK_THROWS(Fault, decoded(c.layout, block, 3, 0, 3));
    CHECK_THROWS(Fault, decoded(c.layout, block, 5, 0, 5));
}

// Whatever the bytes are: what the plain decoder refuses, every ISA does, and what it takes means the same to all.
TEST(hostile_blocks_are_refused_or_read_alike) {
    int refused = 0, read = 0;
    for (int round = 0; round < 1500; ++round) {
        Layout layout = any_layout(random);
        layout.kept = std::min(layout.kept, 70u);
        const Case c = make(random, layout, 1 + below(random, 6), static_cast<int>(below(random, 3)));
        Block block = c.encoded();
        switch (below(random, 6)) {
            case 0:
                for (std::byte& b : block) b = static_cast<std::byte>(random());
                break;
            case 1:
                block.resize(below(random, block.size() + 1));
                break;
            case 2:
                block.resize(block.size() + below(random, 17));
                break;
            case 3:
                for (std::size_t i = below(random, block.size()); i < block.size(); ++i) block[i] = std::byte{0xFF};
                break;
            default:
                for (std::size_t flips = 1 + below(random, 3); flips > 0; --flips)
                    block[below(random, block.size())] ^= static_cast<std::byte>(1 << below(random, 8));
        }
        const Scope scope(c.name());
        std::optional<Decoded> expected;
        try {
            expected = plain_decode(c.layout, block, c.n);
        } catch (const Illegal&) {
        }
        ++(expected ? read : refused);
        for_each_isa([&] {
            try {
                const Decoded got = decoded(c.layout, block, c.n, 0, c.n);
                CHECK(expected.has_value());
                if (expected) CHECK(got == *expected);
            } catch (const Fault& fault) {
                CHECK(fault.code == Code::corrupt);
                CHECK(!expected.has_value());
            }
            const std::size_t first = below(random, c.n + 1), count = below(random, c.n - first + 1);
            try {
                const Decoded got = decoded(c.layout, block, c.n, first, count);
                if (expected) CHECK(got == expected->part(first, count, c.n));
            } catch (const Fault&) {
                CHECK(!expected.has_value());
            }
        });
    }
    CHECK(refused > 100 && read > 100);
}
