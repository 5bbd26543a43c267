// Packed tokens of every ISA against the decoder of blocks, and hostile ones in memory without a byte to spare.
#include "cache/rows/packed.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cache/fault.h"
#include "core/error.h"
#include "cpu/dispatch.h"
#include "harness.h"
#include "isas.h"

using namespace kdfast;
using namespace kdfast::cache;
using namespace kdfast::test;

namespace {

std::size_t below(Random& random, std::size_t n) { return random() % n; }

struct Rows {
    std::vector<std::int32_t> ids;
    std::vector<float> logprobs;

    explicit Rows(std::size_t entries) : ids(entries, -7), logprobs(entries, NAN) {}
    bool operator==(const Rows&) const = default;
};

// A block of one layout, with differences of every length, and its tokens packed.
struct Sample {
    static constexpr std::int64_t tokens = 70;
    Layout layout;
    std::vector<std::byte> block, data;
    std::vector<std::int32_t> offset = std::vector<std::int32_t>(tokens), k_eff = offset;
    std::vector<float> top = std::vector<float>(tokens), lse = top;

    Sample(Random& random, std::uint32_t vocab_size, std::uint32_t kept) {
        layout.vocab_size = vocab_size;
        layout.kept = std::min(kept, vocab_size);
        layout.ragged = true;
        layout.temperatures = {2.0};
        Rows given(tokens * layout.kept);
        for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i) {
            k_eff[i] = static_cast<std::int32_t>(below(random, layout.kept + 1));
            const std::size_t first = below(random, vocab_size);
            double logprob = -0.5;
            for (std::size_t j = 0; j < layout.kept; ++j) {
                given.ids[i * layout.kept + j] = static_cast<std::int32_t>((first + j) % vocab_size);
                given.logprobs[i * layout.kept + j] = static_cast<float>(logprob);
                const std::size_t kind = below(random, 9);
                logprob -= std::ldexp(below(random, kind == 0 ? 4000 : kind < 3 ? 280 : 15), -4);
            }
        }
        Source source;
        source.tokens = tokens;
        source.ids = given.ids.data();
        source.logprobs = given.logprobs.data();
        source.k_eff = k_eff.data();
        source.lse = lse.data();
        source.lse_stride = tokens;
        encode(layout, source, block);
        block.resize(block.size() + padding_after_block);
    }
    std::span<const std::byte> bytes() const { return std::span(block).first(block.size() - padding_after_block); }
    Rows decoded() const {
        Rows out(tokens * layout.kept);
        Destination to;
        to.tokens = tokens;
        to.ids = out.ids.data();
        to.logprobs = out.logprobs.data();
        decode(layout, {bytes(), tokens, 0, to});
        return out;
    }
    // Tokens [first, first + count) at their own rows.
    void pack(std::int64_t first, std::int64_t count) {
        // Behind what is there already, and with what was there before as it was.
        std::vector<std::byte> lent(1000);
        PackedBytes bytes_of(lent.data(), lent.size());
        std::copy(data.begin(), data.end(), bytes_of.room(data.size()));
        bytes_of.grow(data.size());
        Packed out;
        out.data = &bytes_of;
        out.offset = offset.data();
        out.top = top.data();
        out.rest.tokens = tokens;
        out.rest.lse = lse.data();
        out.rest.lse_stride = tokens;
        out.rest.k_eff = k_eff.data();
        cache::pack(layout, bytes(), tokens, first, count, out, first);
        data.assign(bytes_of.data(), bytes_of.data() + bytes_of.size());
    }
    Rows unpacked() const {
        // Exactly as long as it says, so that a sanitizer sees what is read behind it.
        const auto exact = std::make_unique<std::byte[]>(std::max<std::size_t>(data.size(), 1));
        std::copy(data.begin(), data.end(), exact.get());
        Rows out(tokens * layout.kept);
        const PackedSource source{tokens, {exact.get(), data.size()}, offset.data(), top.data(), k_eff.data()};
        unpack(layout, source, out.ids.data(), out.logprobs.data(), 2);
        return out;
    }
};

}  // namespace

TEST(packed_tokens_hold_what_their_block_does) {
    for (const std::uint32_t vocab_size : {1u, 2u, 300u, 128256u, 1u << 24}) {
        const Scope scope{text("V ", vocab_size)};
        for_each_isa([&] {
            for (const std::uint32_t kept : {1u, 2u, 17u, 64u, 300u}) {
                Sample sample(random, vocab_size, kept);
                // In pieces, in any order.
                sample.pack(40, 30);
                sample.pack(0, 1);
                sample.pack(1, 39);
                CHECK(sample.data.size() % 4 == 0);
                CHECK(sample.unpacked() == sample.decoded());
            }
        });
    }
}

TEST(hostile_tokens_are_refused_or_unpacked) {
    for_each_isa([&] {
        Sample sound(random, 5000, 20);
        sound.pack(0, Sample::tokens);
        for (int i = 0; i < 300; ++i) {
            Sample hostile = sound;
            for (std::size_t changes = 1 + below(random, 3); changes > 0; --changes) {
                const std::size_t token = below(random, Sample::tokens);
                switch (below(random, 4)) {
                    case 0:
                        hostile.offset[token] = static_cast<std::int32_t>(random());
                        break;
                    case 1:
                        hostile.k_eff[token] = static_cast<std::int32_t>(below(random, 25)) - 2;
                        break;
                    case 2:
                        hostile.data.resize(below(random, hostile.data.size() + 1) / 4 * 4);
                        break;
                    default:
                        if (!hostile.data.empty())
                            hostile.data[below(random, hostile.data.size())] = static_cast<std::byte>(random());
                }
            }
            try {
                static_cast<void>(hostile.unpacked());
            } catch (const ArgumentError&) {
                continue;
            }
        }
    });
}
