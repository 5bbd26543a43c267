// A cache in a folder of its own, of samples that say what they should be.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "cache/store/reader.h"
#include "cache/store/writer.h"
#include "harness.h"

namespace kdfast::test {

using namespace kdfast::cache;

inline constexpr std::uint32_t vocab_size = 1000, kept = 8;

class Folder {
  public:
    Folder() {
        std::string pattern = (std::filesystem::temp_directory_path() / "kdfast-test-XXXXXX").string();
        if (!::mkdtemp(pattern.data())) throw std::runtime_error("no temporary directory");
        path_ = pattern;
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    std::string path() const { return path_ + "/cache"; }

  private:
    std::string path_;
};

// Targets that are a function of their key, on the grid, so that they come back as they were but for the top's place.
struct Targets8 {
    std::vector<std::int32_t> ids;
    std::vector<float> logprobs, lse;
    std::int64_t tokens;

    explicit Targets8(int number) : tokens(3 + number * 37 % 300) {
        for (std::int64_t i = 0; i < tokens; ++i) {
            for (std::uint32_t j = 0; j < kept; ++j) {
                ids.push_back(static_cast<std::int32_t>((static_cast<std::uint64_t>(number) * 31 + i * 7 + j * 101) %
                                                        vocab_size));
                logprobs.push_back(-1.0f - static_cast<float>(j) * 0.5f);
            }
            lse.push_back(static_cast<float>(1 + i % 5));  // of entries whose logarithm is 0.86
        }
    }
    Sample sample(const std::string& key) const {
        Sample s;
        s.key = key;
        s.kept = kept;
        s.token_hash = TokenHash{static_cast<std::byte>(tokens)};
        s.targets = {
            .tokens = tokens, .ids = ids.data(), .logprobs = logprobs.data(), .lse = lse.data(), .lse_stride = tokens};
        return s;
    }
};

inline constexpr Codec tiers[] = {Codec::fixed, Codec::compact};

inline WriterOptions options(Codec tier) {
    WriterOptions o;
    o.tier = tier;
    o.header = {.vocab_size = vocab_size, .shift = 1, .temperatures = {1, 2}, .metadata = "{}"};
    o.limits = {.shard_bytes = 50000, .commit_bytes = 9000};
    o.queue_bytes = 40000;
    o.threads = 2;
    return o;
}

inline void check_sample(const Reader& reader, const std::string& key, int number) {
    const Targets8 expected(number);
    const Place& place = reader.find(key);
    CHECK_EQUAL(place.entry.tokens, static_cast<std::uint32_t>(expected.tokens));
    std::vector<std::int32_t> ids(expected.ids.size());
    std::vector<float> logprobs(ids.size()), lse(expected.lse.size());
    reader.read({.place = &place,
                 .first = 0,
                 .out = {.tokens = expected.tokens,
                         .ids = ids.data(),
                         .logprobs = logprobs.data(),
                         .lse = lse.data(),
                         .lse_stride = expected.tokens}});
    CHECK(ids == expected.ids);
    for (std::size_t i = 0; i < logprobs.size(); ++i) CHECK_NEAR(logprobs[i], expected.logprobs[i], 1e-5);
    for (std::size_t i = 0; i < lse.size(); ++i) CHECK_NEAR(lse[i], expected.lse[i], 1e-5);
}

inline std::string key_of(int writer, int number) {
    return "w" + std::to_string(writer) + "/" + std::to_string(number);
}

}  // namespace kdfast::test
