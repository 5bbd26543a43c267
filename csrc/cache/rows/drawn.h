// The drawn codec (FORMAT.md, section 6.3). codec.h is what others call.
#pragma once

#include "cache/codec.h"

namespace kdfast::cache {

void encode_drawn(const Layout& layout, const Source& targets, std::vector<std::byte>& out);
void decode_drawn(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
                  const Destination& out);

}  // namespace kdfast::cache
