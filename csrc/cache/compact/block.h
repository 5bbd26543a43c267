// Compact blocks out of fixed ones: both hold the same numbers (FORMAT.md, section 6.2).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/compact/compact.h"

namespace kdfast::cache {

// Room for the quantised targets of a block.
class QuantisedRows {
  public:
    QuantisedRows(const Layout& layout, std::int64_t tokens);

    QuantisedSource source() const;

    // Of a fixed block that encode() of codec.h made; `layout` may be that of either codec.
    static QuantisedRows of_fixed(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens);

  private:
    std::int64_t tokens_;
    std::vector<std::uint32_t> ids_, steps_;
    std::vector<float> top_, lse_, gold_;
    std::vector<std::uint16_t> k_eff_;
};

}  // namespace kdfast::cache
