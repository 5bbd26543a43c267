// CRC-32C where there is no more than the instruction for it.
#pragma once

#include "cache/crc/streams.h"

namespace kdfast::cpu::KDFAST_ISA {

inline std::uint32_t crc32c(const std::byte* bytes, std::size_t count, std::uint32_t before) {
    return crc_by_streams(bytes, count, before);
}

}  // namespace kdfast::cpu::KDFAST_ISA
