// Targets of the fixed codec as they are stored, but token by token: what a device unpacks by itself.
//
// The bytes of a token are its ids, its deltas and its escapes (FORMAT.md, section 6.1), end to end, and zeros up to a
// multiple of 4. They begin at 4 times its offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "cache/codec.h"

namespace kdfast::cache {

// Bytes that are appended to, without being cleared before; in room that somebody lends as long as that is enough.
class PackedBytes {
  public:
    PackedBytes() = default;
    PackedBytes(std::byte* room, std::size_t bytes) : data_(room), capacity_(bytes) {}

    const std::byte* data() const { return data_; }
    std::byte* data() { return data_; }
    std::size_t size() const { return size_; }

    // Where the next bytes belong, with room for so many.
    std::byte* room(std::size_t bytes) {
        if (bytes > capacity_ - size_) reserve(size_ + bytes + size_ / 2);
        return data_ + size_;
    }
    void grow(std::size_t bytes) { size_ += bytes; }
    // Room of its own for so many in all, more than there is.
    void reserve(std::size_t bytes);

  private:
    struct Free {
        void operator()(std::byte* data) const { std::free(data); }
    };
    std::unique_ptr<std::byte, Free> own_;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0, capacity_ = 0;
};

// Where the tokens of a sample go; a pointer is null where nobody asks, or the layout has no such field.
struct Packed {
    PackedBytes* data = nullptr;     // appended to
    std::int32_t* offset = nullptr;  // (tokens), in units of 4 bytes
    float* top = nullptr;            // (tokens)
    std::uint8_t* grid = nullptr;    // of the frame
    Destination rest;                // lse, k_eff and gold, of all tokens; its ids and logprobs are null
};

// Appends the tokens [first, first + count) of a block of `tokens`, which are rows [row, row + count) of `out`. The
// block is followed by padding_after_block bytes, and has been proven: who unpacks the bytes need not look. Throws as
// `decode` without ids, and ArgumentError for another codec.
void pack(const Layout& layout, std::span<const std::byte> block, std::int64_t tokens, std::int64_t first,
          std::int64_t count, const Packed& out, std::int64_t row);

// Packed tokens in memory.
struct PackedSource {
    std::int64_t tokens = 0;
    std::span<const std::byte> data;
    const std::int32_t* offset = nullptr;  // (tokens)
    const float* top = nullptr;            // (tokens)
    const std::int32_t* k_eff = nullptr;   // (tokens); null: K each
};

// Decodes them into (tokens, K) ids and logprobs, on up to `threads` threads; bytes beyond `data` are not touched.
// Throws ArgumentError for tokens that cannot have been packed. Of the layout vocab_size, kept and grid are looked at.
void unpack(const Layout& layout, const PackedSource& packed, std::int32_t* ids, float* logprobs, int threads);

}  // namespace kdfast::cache
