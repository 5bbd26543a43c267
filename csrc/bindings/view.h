// A tensor as it crosses from Python.
#pragma once

#include <algorithm>
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
    std::int64_t storage_bytes;         // of its memory, from the first element on

    std::int64_t count() const {
        std::int64_t n = 1;
        for (const std::int64_t s : shape) n *= s;
        return n;
    }

    // `apart`: or neighbouring rows side by side and the columns of each a stride apart.
    Rows rows(const char* name, const std::vector<std::int64_t>& leading, bool apart = false) const {
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
        const bool sized = !shape.empty() && shape.size() == strides.size();
        const bool contiguous = sized && (strides.back() == 1 || shape.back() == 1);
        apart = apart && sized && (shape.size() == 1 || strides[strides.size() - 2] == 1);
        if (!contiguous && !apart) throw ArgumentError(std::string(name) + " must be (..., V) with contiguous rows");
        r.data = reinterpret_cast<std::byte*>(data);
        r.columns = shape.back();
        r.shape.assign(shape.begin(), shape.end() - 1);
        r.strides.assign(strides.begin(), strides.end() - 1);
        if (!contiguous) r.column_stride = strides.back();
        if (r.shape != leading) throw ArgumentError(std::string(name) + ": leading axes differ from the student's");
        check_memory(name, static_cast<std::int64_t>(size_of(r.dtype)));
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
        check_memory(name, sizeof(T));
        return reinterpret_cast<T*>(data);
    }

  private:
    // A tensor outlives its memory where somebody takes that back, as FSDP2 does from parameters when it reshards.
    void check_memory(const char* name, std::int64_t element) const {
        if (count() == 0) return;
        std::int64_t last = 0;
        for (std::size_t axis = 0; axis < shape.size(); ++axis) last += (shape[axis] - 1) * strides[axis];
        const std::int64_t needed = (last + 1) * element;
        if (storage_bytes >= needed) return;
        throw ArgumentError(std::string(name) + " takes " + std::to_string(needed) + " bytes, but its storage holds " +
                            std::to_string(std::max<std::int64_t>(storage_bytes, 0)) +
                            ": its memory was freed, as FSDP2 frees parameters when it reshards; call the loss and its "
                            "backward while they are unsharded, or pass a copy");
    }
};

using Optional = std::optional<View>;

}  // namespace kdfast::bindings
