// Rows of a fixed block on any machine; see rows_scalar.h.
#pragma once

#include "cache/rows/scalar.h"

namespace kdfast::cpu::KDFAST_ISA {

class Ids {
  public:
    explicit Ids(unsigned bits) : bits_(bits) {}
    KDFAST_INLINE void decode(const std::byte* ids, std::int64_t k, std::int32_t* out) {
        for (std::int64_t i = 0; i < k; ++i) {
            const std::uint32_t id = id_at(ids, i, bits_);
            largest_ = id > largest_ ? id : largest_;
            out[i] = static_cast<std::int32_t>(id);
        }
    }
    std::uint32_t largest() const { return largest_; }

  private:
    unsigned bits_;
    std::uint32_t largest_ = 0;
};

KDFAST_INLINE cache::Broken decode_deltas(cache::FixedRows& f, const std::byte* deltas, std::int64_t k, float top,
                                          float* out) {
    return decode_deltas_one_by_one(f, deltas, k, top, out);
}

inline std::int64_t count_escapes(const std::byte* deltas, std::int64_t count) {
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const auto byte = std::to_integer<unsigned>(deltas[i]);
        n += (byte & 15) == cache::delta_escaped;
        n += byte >> 4 == cache::delta_escaped;
    }
    return n;
}

}  // namespace kdfast::cpu::KDFAST_ISA
