// The drawn codec (FORMAT.md, section 6.3). codec.h is what others call.
#pragma once

#include "cache/codec.h"

namespace kdfast::cache {

inline constexpr double most_nats = 104;  // of a weight above the least one

void encode_drawn(const Layout& layout, const Source& targets, std::vector<std::byte>& out);
void decode_drawn(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
                  const Destination& out);

}  // namespace kdfast::cache
