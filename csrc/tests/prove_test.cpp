// What the entries of a token are to each other, in what is decoded and in what is written.
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cache/fault.h"
#include "cache/kernels.h"
#include "cache/rows/mass.h"
#include "cache/rows/prove.h"
#include "core/error.h"
#include "cpu/dispatch.h"
#include "harness.h"
#include "isas.h"

using namespace kdfast;
using namespace kdfast::cache;
using namespace kdfast::test;

namespace {

double uniform(Random& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }
std::size_t below(Random& random, std::size_t n) { return random() % n; }

// Tokens of `kept` entries, all of the same probability, whose mass at temperatures 1 and 2 is 1.
struct Tokens {
    Layout layout;
    std::int64_t tokens;
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> logprobs, lse;

    Tokens(std::uint32_t kept, std::int64_t count) : tokens(count) {
        layout.vocab_size = 1 << 20;
        layout.kept = kept;
        layout.temperatures = {2.0};
        layout.ragged = true;
        const double top = -std::log(kept);
        for (std::int64_t i = 0; i < tokens; ++i) {
            k_eff.push_back(static_cast<std::int32_t>(kept));
            for (std::uint32_t j = 0; j < kept; ++j)
                ids.push_back(static_cast<std::int32_t>((i + j * 1009u) % layout.vocab_size));
            lse.push_back(static_cast<float>(std::log(kept) + top / 2));
        }
        logprobs.assign(ids.size(), static_cast<float>(top));
    }
    Source source() const {
        Source s;
        s.tokens = tokens;
        s.ids = ids.data();
        s.logprobs = logprobs.data();
        s.lse = lse.data();
        s.lse_stride = tokens;
        s.k_eff = k_eff.data();
        return s;
    }
};

template <class Change>
void refused_by_both(const char* what, const Tokens& sound, Change change) {
    const Scope scope(text(what, ", K ", sound.layout.kept));
    Tokens rows = sound;
    change(rows);
    CHECK_THROWS(Fault, prove(rows.layout, rows.source()));
    CHECK_THROWS(ArgumentError, check(rows.layout, rows.source()));
}

}  // namespace

TEST(rows_are_proven) {
    for_each_isa([&] {
        for (const std::uint32_t kept : {1u, 2u, 7u, 16u, 63u, 64u, 65u, 1000u, 65535u}) {
            const Tokens sound(kept, kept > 1000 ? 3 : 70);
            prove(sound.layout, sound.source());
            check(sound.layout, sound.source());
            const auto token = static_cast<std::size_t>(below(random, static_cast<std::size_t>(sound.tokens)));
            const std::size_t entry = token * kept + below(random, kept);
            refused_by_both("mass", sound, [&](Tokens& r) {
                for (std::uint32_t j = 0; j < kept; ++j) r.logprobs[token * kept + j] += kept == 1 ? 0 : 3e-5f;
                r.lse[token] -= kept == 1 ? 3e-5f : 0;
            });
            refused_by_both("lse", sound, [&](Tokens& r) { r.lse[token] -= 3e-5f; });
            if (kept == 1) continue;
            refused_by_both("one entry", sound, [&](Tokens& r) { r.logprobs[entry] = -1e-6f; });
            const std::size_t other = token * kept + (entry % kept + 1) % kept;
            refused_by_both("twice", sound, [&](Tokens& r) { r.ids[entry] = r.ids[other]; });

            // What is not in use is not looked at.
            Tokens shorter = sound;
            shorter.k_eff[token] = static_cast<std::int32_t>(kept - 1);
            shorter.ids[(token + 1) * kept - 1] = shorter.ids[token * kept];
            shorter.logprobs[(token + 1) * kept - 1] = 0;
            prove(shorter.layout, shorter.source());
            check(shorter.layout, shorter.source());
        }
    });
}

TEST(an_id_may_come_again_in_another_row) {
    Tokens rows(3, 600);  // more of them than a byte can number
    for (std::int64_t i = 0; i < rows.tokens; ++i)
        for (int j = 0; j < 3; ++j) rows.ids[static_cast<std::size_t>(3 * i + j)] = 5 + j;
    for (int again = 0; again < 3; ++again) prove(rows.layout, rows.source());
    rows.ids[3 * 255] = 6;
    CHECK_THROWS(Fault, prove(rows.layout, rows.source()));
}

TEST(masses_are_sums_of_exponentials) {
    for_each_isa([&] {
        for (int round = 0; round < 200; ++round) {
            std::vector<float> x(1 + below(random, 200));
            const double scale = std::exp(4 * uniform(random) - 2), lse = 10 * uniform(random) - 9;
            for (float& value : x) value = static_cast<float>(below(random, 20) == 0 ? -1e30 : -200 * uniform(random));
            double sum = 0;
            for (const float value : x) sum += std::exp(std::max(value * scale - lse, -87.0));
            const double got = cpu::kernels().cache->mass(x.data(), static_cast<std::int64_t>(x.size()),
                                                          static_cast<float>(scale), static_cast<float>(lse));
            CHECK_NEAR(got, sum, 3e-5 * sum + 1e-30);  // arguments of 400 are an f32; none is below -87
        }
    });
}

TEST(masses_of_temperature_two_and_one) {
    for_each_isa([&] {
        for (int round = 0; round < 200; ++round) {
            std::vector<float> x(1 + below(random, round % 4 ? 200 : 512));
            for (float& value : x) value = static_cast<float>(below(random, 20) == 0 ? -1e30 : -30 * uniform(random));
            double two = 0, one = 0;
            for (const float value : x) {
                two += std::exp(value / 2.0);
                one += std::exp(double{value});
            }
            float got[2];
            cpu::kernels().cache->masses(x.data(), static_cast<std::int64_t>(x.size()), got);
            CHECK_NEAR(got[0], two, 3e-6 * two + 1e-30);
            CHECK_NEAR(got[1], one, 3e-6 * one + 1e-30);
        }
    });
}

TEST(masses_at_temperatures_that_no_f32_holds) {
    Tokens rows(1, 1);
    rows.logprobs[0] = -1e-30f;
    for (const double temperature : {1e-300, 1e-20, 1e20, 1e300}) {
        rows.layout.temperatures = {temperature};
        rows.lse[0] = 0.5f;
        prove(rows.layout, rows.source());
        rows.lse[0] = -0.5f;
        if (temperature > 1e-100)
            CHECK_THROWS(Fault, prove(rows.layout, rows.source()));
        else
            prove(rows.layout, rows.source());  // e^-10^270
    }
}
