// Strided views of memory that somebody else owns. Core code sees tensors only through these.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kdfast {

enum class DType : std::uint8_t { f32, bf16, f16 };

constexpr std::size_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// Rows of a tensor (..., columns): contiguous within a row, any strides between rows, so that a shifted or sliced view
// such as logits[:, :-1] needs no copy.
struct Rows {
    std::byte* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t columns = 0;
    std::vector<std::int64_t> shape;    // leading axes
    std::vector<std::int64_t> strides;  // of the leading axes, in elements
    std::int64_t column_stride = 1;     // of the classes of images (B, C, H, W) another: see cpu/apart.h

    // Makes one axis of neighbours that lie as one would, so that finding a row takes fewer divisions.
    void merge_axes() {
        for (std::size_t axis = shape.size(); axis-- > 1;) {
            if (strides[axis - 1] != shape[axis] * strides[axis]) continue;
            shape[axis - 1] *= shape[axis];
            strides[axis - 1] = strides[axis];
            shape.erase(shape.begin() + static_cast<std::ptrdiff_t>(axis));
            strides.erase(strides.begin() + static_cast<std::ptrdiff_t>(axis));
        }
    }

    // Inlined always: a copy of it outside an instruction set's namespace would be shared between them.
    [[gnu::always_inline]] std::byte* row(std::int64_t index) const {
        std::int64_t offset = 0;
        for (std::size_t axis = shape.size(); axis-- > 1;) {
            offset += index % shape[axis] * strides[axis];
            index /= shape[axis];
        }
        if (!shape.empty()) offset += index * strides[0];  // no division for a matrix
        return data + offset * static_cast<std::int64_t>(size_of(dtype));
    }
};

}  // namespace kdfast
