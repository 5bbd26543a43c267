// What decoded rows have to be, beyond what decoding them finds.
#pragma once

#include "cache/codec.h"

namespace kdfast::cache {

// Throws Fault (corrupt) where an id stands twice in a token, or a token's entries have a mass above 1 at a captured
// temperature (FORMAT.md, section 6.1). `rows` are those of a block, as decoding left them. What has been
// proven of a block's bytes once need not be proven again.
void prove(const Layout& layout, const Source& rows);

}  // namespace kdfast::cache
