// Calls on logits whose columns lie apart in memory, as the classes of images (B, C, H, W) do.
#pragma once

#include "cpu/dense.h"

namespace kdfast::cpu {

// kernel(call), where rows may have any column_stride; if that is not 1, neighbouring rows lie side by side. A group of
// rows at a time is transposed into memory that stays in the cache, and its gradient from there: memory sees each logit
// and each gradient once, as it does for contiguous rows, and what comes out has the same bits.
void run_apart(const DenseCall& call, DenseForward kernel);

}  // namespace kdfast::cpu
