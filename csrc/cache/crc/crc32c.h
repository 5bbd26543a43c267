// CRC-32C (Castagnoli), the checksum of everything that is stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kdfast::cache {

// Of `bytes`, going on from the checksum of what comes before them.
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before = 0);

// Whether they are what was stored. A fuzzer is not held up by a checksum, behind which it would find nothing.
inline bool has_crc(std::span<const std::byte> bytes, std::uint32_t expected) {
#if defined(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION)
    static_cast<void>(crc32c(bytes) == expected);
    return true;
#else
    return crc32c(bytes) == expected;
#endif
}

}  // namespace kdfast::cache
