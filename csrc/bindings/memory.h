// Memory that tensors of a reader lie in.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "cache/format.h"
#include "cache/rows/packed.h"
#include "core/pool.h"

namespace kdfast::bindings {

// Of all readers; the interpreter's lock guards it, and there is no end at which it would be gone before a tensor.
inline Pool& pool() {
    static Pool& of_all = *new Pool(std::size_t{64} << 20);
    return of_all;
}

// What a tensor of a reader lies in. It goes back to the pool with the tensor.
class Memory {
  public:
    explicit Memory(std::size_t bytes) : bytes_(bytes), block_(pool().take(bytes)) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { pool().give(std::move(block_)); }

    std::byte* data() const { return block_.data.get(); }
    pybind11::buffer_info view() const { return {block_.data.get(), 1, "B", static_cast<pybind11::ssize_t>(bytes_)}; }

  private:
    std::size_t bytes_;
    Pool::Block block_;
};

// The bytes of a sample's packed tokens.
struct PackedData {
    std::unique_ptr<Memory> memory;  // null where malloc serves
    cache::PackedBytes bytes;
    std::uint8_t grid = 0;

    // Of so many tokens of a sample, which most likely take no more than their share of it.
    PackedData(const cache::IndexEntry& entry, std::int64_t tokens) {
        constexpr std::uint64_t pooled = std::uint64_t{256} << 10, slack = 256;
        const auto count = static_cast<std::uint64_t>(std::max<std::int64_t>(0, tokens));
        const std::uint64_t share = entry.tokens > 0 ? entry.frame_bytes / entry.tokens * count : 0;
        const auto room = static_cast<std::size_t>(share + share / 16 + 4 * count + slack);
        if (share < pooled) {
            bytes.reserve(room);
        } else {
            memory = std::make_unique<Memory>(room);
            bytes = cache::PackedBytes(memory->data(), room);
        }
    }

    pybind11::buffer_info view() { return {bytes.data(), 1, "B", static_cast<pybind11::ssize_t>(bytes.size())}; }
};

}  // namespace kdfast::bindings
