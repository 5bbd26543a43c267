// The checksum of every ISA against its definition, bit by bit.
#include "cache/crc/crc32c.h"

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "cache/kernels.h"
#include "cpu/dispatch.h"
#include "harness.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

std::uint32_t by_definition(std::span<const std::byte> bytes, std::uint32_t state) {
    for (const std::byte b : bytes) {
        state ^= std::to_integer<std::uint32_t>(b);
        for (int bit = 0; bit < 8; ++bit) state = state & 1 ? state >> 1 ^ 0x82F63B78 : state >> 1;
    }
    return state;
}

std::vector<std::byte> random_bytes(Random& random, std::size_t count) {
    std::vector<std::byte> bytes(count);
    for (std::byte& b : bytes) b = static_cast<std::byte>(random());
    return bytes;
}

template <class Body>
void for_each_isa(Body body) {
    for (const cpu::Isa& isa : cpu::isa_table()) {
        if (!isa.supported()) continue;
        const Scope scope{std::string(isa.name)};
        body([&isa](std::span<const std::byte> bytes, std::uint32_t state) {
            return isa.kernels->cache->crc32c(bytes.data(), bytes.size(), state);
        });
    }
}

}  // namespace

TEST(crc32c_of_known_bytes) {
    const auto of = [](std::string_view words) { return cache::crc32c(std::as_bytes(std::span(words))); };
    CHECK_EQUAL(of(""), 0u);
    CHECK_EQUAL(of("a"), 0xC1D04330u);
    CHECK_EQUAL(of("123456789"), 0xE3069283u);
    CHECK_EQUAL(of("The quick brown fox jumps over the lazy dog"), 0x22620404u);
    std::vector<std::byte> bytes(32);  // those of RFC 3720, B.4
    CHECK_EQUAL(cache::crc32c(bytes), 0x8A9136AAu);
    for (std::byte& b : bytes) b = std::byte{0xFF};
    CHECK_EQUAL(cache::crc32c(bytes), 0x62A8AB43u);
    for (std::size_t i = 0; i < 32; ++i) bytes[i] = static_cast<std::byte>(i);
    CHECK_EQUAL(cache::crc32c(bytes), 0x46DD794Eu);
}

TEST(crc32c_of_every_length_and_alignment) {
    const std::vector<std::byte> bytes = random_bytes(random, 1100);
    const auto state = static_cast<std::uint32_t>(random());
    for (std::size_t from = 0; from < 16; ++from) {
        std::vector<std::uint32_t> expected{state};
        for (std::size_t n = 1; n <= 1024; ++n)
            expected.push_back(by_definition(std::span(bytes).subspan(from + n - 1, 1), expected.back()));
        for_each_isa([&](auto crc32c) {
            for (std::size_t n = 0; n <= 1024; ++n) {
                const Scope scope(text(n, " bytes from ", from));
                CHECK_EQUAL(crc32c(std::span(bytes).subspan(from, n), state), expected[n]);
            }
        });
    }
}

TEST(crc32c_of_long_inputs) {
    for (int round = 0; round < 40; ++round) {
        // Exactly as long as the memory, at whose end AddressSanitizer stands guard.
        const std::vector<std::byte> bytes = random_bytes(random, 1024 + random() % 40000);
        const std::uint32_t expected = by_definition(bytes, ~0u);
        for_each_isa([&](auto crc32c) {
            const Scope scope(text(bytes.size(), " bytes"));
            CHECK_EQUAL(crc32c(bytes, ~0u), expected);
        });
        const std::span all(bytes);
        const std::size_t part = random() % bytes.size();
        CHECK_EQUAL(cache::crc32c(all.subspan(part), cache::crc32c(all.first(part))), ~expected);
    }
}
