// One matrix, transposed block by block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast::cpu {

// The side that lies in memory, with rows far from each other; the other one stays in the cache.
enum class Far : std::uint8_t { from, to };

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows and j < columns, elements of `size` bytes, 2 or 4;
// strides in elements. The far side's lines are read or written once each, which a loop over strided elements does not
// do, and written past the cache where they are aligned: other threads see them after fence_streams().
void transpose(Far far, const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride,
               std::int64_t rows, std::int64_t columns, std::size_t size);
void fence_streams();

}  // namespace kdfast::cpu
