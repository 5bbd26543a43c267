#include "cache/crc/crc32c.h"

#include "cache/kernels.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before) {
    return ~cpu::kernels().cache->crc32c(bytes.data(), bytes.size(), ~before);
}

}  // namespace kdfast::cache
