// Matrices of every dtype in memory whose every byte is accounted for, and conversions by arithmetic, not by bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace kdfast::test {

struct Format {
    int digits, min_exponent, max_exponent;
};
inline Format format_of(DType t) {
    return t == DType::f32 ? Format{24, -126, 127} : t == DType::bf16 ? Format{8, -126, 127} : Format{11, -14, 15};
}

// The nearest value of a dtype, ties to even.
inline double rounded(DType t, double x) {
    if (x == 0 || !std::isfinite(x)) return x;
    const Format f = format_of(t);
    const double step = std::ldexp(1.0, std::max(std::ilogb(x), f.min_exponent) - f.digits + 1);
    const double r = std::nearbyint(x / step) * step;
    return std::abs(r) >= std::ldexp(1.0, f.max_exponent + 1)
               ? std::copysign(std::numeric_limits<double>::infinity(), x)
               : r;
}

inline std::uint32_t encoded(DType t, double x) {
    const Format f = format_of(t);
    const int mantissa_bits = f.digits - 1;
    const std::uint32_t exponent_of_infinity = static_cast<std::uint32_t>(f.max_exponent - f.min_exponent + 2);
    const std::uint32_t sign = std::signbit(x) ? 1u << (t == DType::f32 ? 31 : 15) : 0u;
    if (std::isnan(x)) return exponent_of_infinity << mantissa_bits | 1u << (mantissa_bits - 1);
    const double r = std::abs(rounded(t, x));
    if (std::isinf(r)) return sign | exponent_of_infinity << mantissa_bits;
    const auto units = [&](int exponent) {
        return static_cast<std::uint32_t>(std::ldexp(r, mantissa_bits - exponent));
    };
    if (r < std::ldexp(1.0, f.min_exponent)) return sign | units(f.min_exponent);
    const int e = std::ilogb(r);
    return sign | ((static_cast<std::uint32_t>(e - f.min_exponent) << mantissa_bits) + units(e));
}

inline double decoded(DType t, std::uint32_t bits) {
    const Format f = format_of(t);
    const int mantissa_bits = f.digits - 1, total = t == DType::f32 ? 32 : 16;
    const double sign = bits >> (total - 1) & 1u ? -1.0 : 1.0;
    const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
    const int e = static_cast<int>(bits >> mantissa_bits & ((1u << (total - f.digits)) - 1));
    if (e == f.max_exponent - f.min_exponent + 2)
        return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    const double implied = e == 0 ? 0.0 : std::ldexp(1.0, mantissa_bits);
    return sign * std::ldexp(mantissa + implied, (e == 0 ? f.min_exponent : f.min_exponent + e - 1) - mantissa_bits);
}

// Where rows lie: `before` elements in front of the first, `gap` between two, `after` behind the last. All 0 is an
// allocation of exactly the matrix, at whose end AddressSanitizer stands guard.
struct Layout {
    std::int64_t before = 0, gap = 0, after = 0;
};
inline constexpr Layout exact{0, 0, 0};
inline constexpr Layout guarded{65, 3, 67};  // odd, so that rows start at odd addresses

class Matrix {
  public:
    Matrix(DType dtype, std::int64_t rows, std::int64_t columns, Layout layout)
        : dtype_(dtype), rows_(rows), columns_(columns), layout_(layout) {
        const std::int64_t gaps = rows > 0 ? (rows - 1) * layout.gap : 0;
        bytes_ = static_cast<std::size_t>(layout.before + rows * columns + gaps + layout.after) * size_of(dtype);
        memory_ = std::make_unique<std::byte[]>(bytes_);
        std::memset(memory_.get(), canary, bytes_);
    }

    Rows rows() const {
        Rows r;
        r.data = memory_.get() + static_cast<std::size_t>(layout_.before) * size_of(dtype_);
        r.dtype = dtype_;
        r.columns = columns_;
        r.shape = {rows_};
        r.strides = {columns_ + layout_.gap};
        return r;
    }
    DType dtype() const { return dtype_; }
    std::int64_t columns() const { return columns_; }

    std::uint32_t bits(std::int64_t i, std::int64_t c) const {
        std::uint32_t out = 0;
        std::memcpy(&out, at(i, c), size_of(dtype_));
        return out;
    }
    void set_bits(std::int64_t i, std::int64_t c, std::uint32_t bits) { std::memcpy(at(i, c), &bits, size_of(dtype_)); }
    double get(std::int64_t i, std::int64_t c) const { return decoded(dtype_, bits(i, c)); }
    void set(std::int64_t i, std::int64_t c, double x) { set_bits(i, c, encoded(dtype_, x)); }
    std::vector<double> row(std::int64_t i, std::int64_t columns) const {
        std::vector<double> out;
        for (std::int64_t c = 0; c < columns; ++c) out.push_back(get(i, c));
        return out;
    }
    void fill(double x) {
        for (std::int64_t i = 0; i < rows_; ++i)
            for (std::int64_t c = 0; c < columns_; ++c) set(i, c, x);
    }
    std::vector<std::uint32_t> all_bits() const {
        std::vector<std::uint32_t> out;
        for (std::int64_t i = 0; i < rows_; ++i)
            for (std::int64_t c = 0; c < columns_; ++c) out.push_back(bits(i, c));
        return out;
    }
    // Whether every byte outside the rows is as it was.
    bool guards_hold() const {
        std::vector<bool> inside(bytes_, false);
        for (std::int64_t i = 0; i < rows_; ++i) {
            const auto begin = static_cast<std::size_t>(at(i, 0) - memory_.get());
            std::fill_n(inside.begin() + static_cast<std::ptrdiff_t>(begin),
                        static_cast<std::size_t>(columns_) * size_of(dtype_), true);
        }
        for (std::size_t b = 0; b < bytes_; ++b)
            if (!inside[b] && memory_[b] != std::byte{canary}) return false;
        return true;
    }

  private:
    static constexpr unsigned char canary = 0xa5;

    std::byte* at(std::int64_t i, std::int64_t c) const {
        const std::int64_t element = layout_.before + i * (columns_ + layout_.gap) + c;
        return memory_.get() + static_cast<std::size_t>(element) * size_of(dtype_);
    }

    DType dtype_;
    std::int64_t rows_, columns_;
    Layout layout_;
    std::size_t bytes_;
    std::unique_ptr<std::byte[]> memory_;
};

}  // namespace kdfast::test
