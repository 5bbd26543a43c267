// Speed of random ranges of 256 tokens by the reader alone, on one core, warm, checksums verified.
// Usage: reader_bench DIRECTORY, a cache whose samples have at least 256 tokens.
//
// A range goes into memory that was used before: the next place of a batch of 32, or always the same.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cache/store/reader.h"

using namespace kdfast::cache;

namespace {

constexpr std::int64_t range_tokens = 256, batch = 32, ranges = 512;
constexpr int rounds = 31;

struct Range {
    std::string key;
    std::int64_t first;
};

// Median microseconds a range.
template <class Serve>
double time_of(Serve serve) {
    std::vector<double> found;
    for (int round = 0; round < rounds; ++round) {
        const auto begin = std::chrono::steady_clock::now();
        for (std::int64_t i = 0; i < ranges; ++i) serve(i);
        const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - begin;
        found.push_back(taken.count() / ranges);
    }
    std::nth_element(found.begin(), found.begin() + rounds / 2, found.end());
    return found[rounds / 2];
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::fputs("usage: reader_bench DIRECTORY\n", stderr);
        return 2;
    }
    const Reader reader(arguments[1]);
    const Catalog& catalog = reader.catalog();
    std::vector<Place> samples;
    std::int64_t kept = 0;
    Catalog::Keys keys(catalog);
    while (const std::optional<std::string> key = keys.next()) {
        const Place place = reader.find(*key);
        if (place.entry.tokens < range_tokens) continue;
        samples.push_back(place);
        kept = std::max<std::int64_t>(kept, place.entry.kept);
    }
    if (samples.empty()) {
        std::fputs("no sample has 256 tokens\n", stderr);
        return 2;
    }
    std::mt19937_64 random(0);
    std::vector<Range> asked;
    for (std::int64_t i = 0; i < ranges; ++i) {
        const Place& place = samples[random() % samples.size()];
        const std::uint64_t starts = place.entry.tokens - range_tokens + 1;
        asked.push_back({place.key, static_cast<std::int64_t>(random() % starts)});
    }
    const auto temperatures = static_cast<std::int64_t>(catalog.header().stored_temperatures().size());
    std::vector<std::int32_t> ids(static_cast<std::size_t>(batch * range_tokens * kept));
    std::vector<float> values(ids.size()), lse(static_cast<std::size_t>(batch * range_tokens * temperatures));
    const auto read = [&](std::int64_t i, std::int64_t at) {
        const Range& range = asked[static_cast<std::size_t>(i)];
        Destination out;
        out.tokens = range_tokens;
        out.ids = ids.data() + at * range_tokens * kept;
        out.logprobs = values.data() + at * range_tokens * kept;
        out.lse = lse.data() + at * range_tokens * temperatures;
        out.lse_stride = range_tokens;
        const Place place = reader.find(range.key);
        reader.read(ReadRequest{&place, range.first, out});
    };
    const auto say = [](const char* what, double us) { std::printf("%-32s %6.2f us %7.1f k/s\n", what, us, 1e3 / us); };
    say("find", time_of([&](std::int64_t i) { reader.find(asked[static_cast<std::size_t>(i)].key); }));
    say("find, header",
        time_of([&](std::int64_t i) { reader.header(reader.find(asked[static_cast<std::size_t>(i)].key)); }));
    say("find, header, read, 32 places", time_of([&](std::int64_t i) { read(i, i % batch); }));
    say("find, header, read, one place", time_of([&](std::int64_t i) { read(i, 0); }));
    return 0;
}
