// The fixed codec (FORMAT.md, section 6.1). codec.h is what others call.
#pragma once

#include "cache/codec.h"

namespace kdfast::cache {

void encode_fixed(const Layout& layout, const Source& targets, std::vector<std::byte>& out);
void decode_fixed(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
                  const Destination& out);

// Behind `count` escapes from `at` on; throws Fault (corrupt) where they end beyond `end` or are longer than needed.
const std::byte* skip_escapes(const std::byte* at, const std::byte* end, std::int64_t count);

}  // namespace kdfast::cache
