// What the index of a directory knows a key by: 128 bits that nobody can make two keys agree in.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kdfast::cache {

struct KeyHash {
    std::uint64_t high = 0, low = 0;
    auto operator<=>(const KeyHash&) const = default;
};

// BLAKE2b with a digest of 16 bytes and no key (RFC 7693), as of token ids: its first eight bytes are `high`.
KeyHash key_hash(std::string_view key);
// The same of many: quicker than of one after the other.
void key_hashes(std::span<const std::string_view> keys, std::span<KeyHash> out);

}  // namespace kdfast::cache
