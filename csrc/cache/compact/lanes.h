// What encoder and decoder of compact blocks share: the shape of their lanes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast::cache {

inline constexpr std::size_t lanes = 4;
inline constexpr std::uint64_t lane_start = std::uint64_t{1} << 32;  // states are never below it between two steps
inline constexpr std::size_t words_between_checks = 4;               // a delta and an id

}  // namespace kdfast::cache
