// What the values of a sample must be. codec.h is what others call.
#pragma once

#include "cache/codec.h"

namespace kdfast::cache {

void check_fixed(const Layout& layout, const Source& targets);
void check_drawn(const Layout& layout, const Source& targets);

}  // namespace kdfast::cache
