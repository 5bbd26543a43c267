// Matrices whose classes lie apart in memory, as those of images (B, C, H, W) do, and back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast::cpu {

// `count` matrices (rows, columns), each row contiguous; strides in elements of `size` bytes, 2 or 4.
struct Matrices {
    std::byte* data = nullptr;
    std::int64_t between = 0;  // one matrix and the next
    std::int64_t stride = 0;   // one row and the next
};

// to[k][j][i] = from[k][i][j] for i < rows and j < columns: `rows` and `columns` are those of `from`. Each line of the
// cache is read and written once, which a loop over strided elements does not do.
void transpose(const Matrices& from, const Matrices& to, std::int64_t count, std::int64_t rows, std::int64_t columns,
               int size, int threads);

}  // namespace kdfast::cpu
