// What a reader or writer says when a cache is not what it should be (FORMAT.md, section 10).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace kdfast::cache {

enum class Code : std::uint8_t {
    missing,
    version,
    truncated,
    checksum,
    corrupt,
    mismatch,
    duplicate,
    misaligned,
    system,  // the operating system refused: no space, no permission, an input/output error
};
inline constexpr std::array<std::string_view, 9> code_names = {
    "missing", "version", "truncated", "checksum", "corrupt", "mismatch", "duplicate", "misaligned", "system"};

// Becomes Python's kdfast.CacheError. Where it happened is filled in by whoever knows it, from the inside out.
class Fault : public std::runtime_error {
  public:
    Fault(Code kind, const std::string& what) : std::runtime_error(what), code(kind) {}

    Code code;
    std::string path;  // empty: not known
    std::string key;   // empty: not about one key
    std::optional<std::uint64_t> offset;
    int number = 0;  // errno, where the system has said one

    Fault& in(std::string file) {
        if (path.empty()) path = std::move(file);
        return *this;
    }
    Fault& of(std::string sample) {
        if (key.empty()) key = std::move(sample);
        return *this;
    }
    Fault& at(std::uint64_t place) {
        if (!offset) offset = place;
        return *this;
    }
};

}  // namespace kdfast::cache
