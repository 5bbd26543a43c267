// Numbers of any width as bits, the least significant first (FORMAT.md, section 1).
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/bytes.h"

namespace kdfast::cache {

class BitWriter {
  public:
    explicit BitWriter(std::vector<std::byte>& out) : out_(out) {}

    // The low `count` <= 32 bits of value, which has no others.
    void bits(std::uint64_t value, unsigned count) {
        pending_ |= value << filled_;
        filled_ += count;
        if (filled_ >= 32) {
            append(out_, static_cast<std::uint32_t>(pending_));
            pending_ >>= 32;
            filled_ -= 32;
        }
    }
    void unary(std::uint64_t zeros) {  // and a one
        for (; zeros >= 31; zeros -= 31) bits(0, 31);
        bits(std::uint64_t{1} << zeros, static_cast<unsigned>(zeros) + 1);
    }
    void finish() {  // zero bits to a whole byte
        for (; filled_ > 0; filled_ -= filled_ < 8 ? filled_ : 8, pending_ >>= 8)
            out_.push_back(static_cast<std::byte>(pending_ & 255));
    }

  private:
    std::vector<std::byte>& out_;
    std::uint64_t pending_ = 0;
    unsigned filled_ = 0;
};

// May load, but does not use, eight bytes behind its own.
class BitReader {
  public:
    explicit BitReader(std::span<const std::byte> bytes) : data_(bytes.data()), end_(bytes.size() * 8) {}

    std::uint64_t bits(unsigned count) {  // at most 56
        const std::uint64_t value = window() & ((std::uint64_t{1} << count) - 1);
        if (count > end_ - at_) corrupt("a block ends within its stream");
        at_ += count;
        return value;
    }
    std::uint64_t unary(std::uint64_t limit) {
        constexpr unsigned loaded = 56;
        std::uint64_t zeros = 0;
        for (;; zeros += loaded, at_ += loaded) {
            if (at_ >= end_) corrupt("a block ends within its stream");
            if (zeros > limit) corrupt("a number in a block is too large");
            if (const auto more = static_cast<unsigned>(std::countr_zero(window())); more < loaded) {
                zeros += more;
                at_ += more + 1;
                break;
            }
        }
        if (at_ > end_) corrupt("a block ends within its stream");
        if (zeros > limit) corrupt("a number in a block is too large");
        return zeros;
    }
    // Behind the last byte of which a bit was read; the bits of that byte that were not are zero.
    const std::byte* finish() {
        if (at_ % 8 != 0 && bits(static_cast<unsigned>(8 - at_ % 8)) != 0)
            corrupt("the bits behind a stream are not zero");
        return data_ + at_ / 8;
    }

  private:
    std::uint64_t window() const { return load<std::uint64_t>(data_ + at_ / 8) >> (at_ & 7); }  // 57 bits of it

    const std::byte* data_;
    std::uint64_t at_ = 0, end_;
};

}  // namespace kdfast::cache
