// A tensor as it crosses from Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/tensor.h"

namespace kdfast::bindings {

// A tensor as Python describes it. The caller keeps the memory alive during the call.
struct View {
    std::uintptr_t data;
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;  // in elements

    std::int64_t count() const {
        std::int64_t n = 1;
        for (const std::int64_t s : shape) n *= s;
        return n;
    }

    Rows rows(const char* name, const std::vector<std::int64_t>& leading) const {
        Rows r;
        if (dtype == "float32") {
            r.dtype = DType::f32;
        } else if (dtype == "bfloat16") {
            r.dtype = DType::bf16;
        } else if (dtype == "float16") {
            r.dtype = DType::f16;
        } else {
            throw ArgumentError(std::string(name) + ": dtype must be float32, bfloat16 or float16, got " + dtype);
        }
        if (shape.empty() || shape.size() != strides.size() || (strides.back() != 1 && shape.back() != 1))
            throw ArgumentError(std::string(name) + " must be (..., V) with contiguous rows");
        r.data = reinterpret_cast<std::byte*>(data);
        r.columns = shape.back();
        r.shape.assign(shape.begin(), shape.end() - 1);
        r.strides.assign(strides.begin(), strides.end() - 1);
        if (r.shape != leading) throw ArgumentError(std::string(name) + ": leading axes differ from the student's");
        r.merge_axes();
        return r;
    }

    template <class T>
    T* values(const char* name, const char* type, std::int64_t expected) const {
        if (dtype != type) throw ArgumentError(std::string(name) + ": dtype must be " + type + ", got " + dtype);
        std::int64_t step = 1;
        for (std::size_t axis = shape.size(); axis-- > 0 && count() > 0;) {
            if (shape[axis] != 1 && strides[axis] != step)
                throw ArgumentError(std::string(name) + " must be contiguous");
            step *= shape[axis];
        }
        if (count() != expected)
            throw ArgumentError(std::string(name) + " must have " + std::to_string(expected) + " elements, got " +
                                std::to_string(count()));
        return reinterpret_cast<T*>(data);
    }
};

using Optional = std::optional<View>;

}  // namespace kdfast::bindings
