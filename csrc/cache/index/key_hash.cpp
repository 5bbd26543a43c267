#include "cache/index/key_hash.h"

#include <algorithm>
#include <cstring>

#include "cache/index/blake2b.h"
#include "cache/kernels.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {

KeyHash key_hash(std::string_view key) {
    std::uint64_t state[8];
    std::ranges::copy(blake2b::initial, state);
    state[0] ^= blake2b::parameters;
    std::uint64_t total = 0;
    do {
        std::uint64_t words[16] = {};
        const std::size_t bytes = std::min(blake2b::block_bytes, key.size());
        if (bytes > 0) std::memcpy(words, key.data(), bytes);
        key.remove_prefix(bytes);
        total += bytes;
        blake2b::compress(state, words, total, key.empty() ? ~std::uint64_t{0} : 0);
    } while (!key.empty());
    return {state[0], state[1]};
}

void key_hashes(std::span<const std::string_view> keys, std::span<KeyHash> out) {
    constexpr std::size_t at_once = 64;
    for (std::size_t first = 0; first < keys.size(); first += at_once) {
        KeyBytes blocks[at_once];
        std::uint64_t hashes[at_once][2];
        const std::size_t count = std::min(at_once, keys.size() - first);
        const auto is_short = [&](std::size_t i) { return keys[first + i].size() <= blake2b::block_bytes; };
        for (std::size_t i = 0; i < count; ++i)
            if (is_short(i))
                blocks[i] = {reinterpret_cast<const std::byte*>(keys[first + i].data()), keys[first + i].size()};
        cpu::kernels().cache->hash_keys(blocks, static_cast<std::int64_t>(count), hashes);
        for (std::size_t i = 0; i < count; ++i)
            out[first + i] = is_short(i) ? KeyHash{hashes[i][0], hashes[i][1]} : key_hash(keys[first + i]);
    }
}

}  // namespace kdfast::cache
