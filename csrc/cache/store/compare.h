// Whether two samples hold the same targets.
#pragma once

#include "cache/codec.h"
#include "cache/store/reader.h"

namespace kdfast::cache {

// Whether a stored sample holds what `targets`, which have been checked, would be stored as on its grid, but for the
// last bits of an f32, however wide the rows of either are. Throws Fault where the stored one is damaged.
bool same_targets(const Reader& reader, const Place& place, const Layout& layout, const Source& targets);
bool same_targets(const Reader& reader, const Place& place, const Reader& other_reader, const Place& other);

}  // namespace kdfast::cache
