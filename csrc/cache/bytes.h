// Numbers in bytes, little endian, at any address, and the sections of a block.
#pragma once

#include <bit>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cache/fault.h"

namespace kdfast::cache {

static_assert(std::endian::native == std::endian::little, "the format is little endian, and so must the machine be");

using Bytes = std::span<const std::byte>;

template <class T>
T load(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T>
T load(Bytes bytes, std::size_t at) {
    return load<T>(bytes.subspan(at, sizeof(T)).data());
}

template <class T>
void store(std::byte* to, T value) {
    std::memcpy(to, &value, sizeof value);
}
template <class T>
    requires std::is_arithmetic_v<T> || std::is_enum_v<T>
void append(std::vector<std::byte>& out, T value) {
    const std::size_t at = out.size();
    out.resize(at + sizeof value);
    store(out.data() + at, value);
}

inline Bytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }
inline std::string_view text_of(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
inline void append(std::vector<std::byte>& out, Bytes bytes) {
    if (bytes.empty()) return;
    const std::size_t at = out.size();
    out.resize(at + bytes.size());
    std::memcpy(out.data() + at, bytes.data(), bytes.size());
}

constexpr std::uint64_t align8(std::uint64_t n) { return (n + 7) & ~std::uint64_t{7}; }
inline bool all_zero(Bytes bytes) {
    for (const std::byte b : bytes)
        if (b != std::byte{0}) return false;
    return true;
}

[[noreturn]] inline void corrupt(const std::string& what) { throw Fault(Code::corrupt, what); }

// Takes sections off the front of a block.
class Sections {
  public:
    explicit Sections(std::span<const std::byte> block) : block_(block) {}

    const std::byte* take(std::int64_t bytes, const char* what) {
        if (static_cast<std::size_t>(bytes) > block_.size()) corrupt(std::string("a block ends within its ") + what);
        const std::byte* at = block_.data();
        block_ = block_.subspan(static_cast<std::size_t>(bytes));
        return at;
    }
    std::span<const std::byte> rest() const { return block_; }

  private:
    std::span<const std::byte> block_;
};

}  // namespace kdfast::cache
