// Rows of logits, sorted descending.
#pragma once

#include <cstdint>

namespace kdfast::cpu {

// `values` (rows, columns) are those of `x`, each row sorted descending, NaN first; `order` their columns, or null
// where nobody asks. Equal values keep the order of their columns. The three are contiguous; `values` may be `x`.
void sort_rows(const float* x, std::int64_t rows, std::int64_t columns, float* values, std::int64_t* order,
               int threads);

}  // namespace kdfast::cpu
