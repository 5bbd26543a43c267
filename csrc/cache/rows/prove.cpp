#include "cache/rows/prove.h"

#include <algorithm>
#include <string>

#include "cache/rows/fields.h"
#include "cache/rows/mass.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
void prove(const Layout& layout, const Source& rows) {
    if (layout.codec == Codec::drawn) return;  // whose ids rise, and whose draws decoding counts
    thread_local Columns columns;
    const Kernels& kernels = *cpu::kernels().cache;
    for (std::int64_t i = 0; i < rows.tokens; ++i) {
        const std::int32_t* ids = rows.ids + i * layout.kept;
        std::int64_t k = layout.kept;
        if (layout.ragged) k = rows.k_eff ? rows.k_eff[i] : std::find(ids, ids + k, -1) - ids;
        if (const std::int64_t j = columns.twice(ids, k, layout.vocab_size); j >= 0)
            corrupt("token " + std::to_string(i) + " of a block has id " + std::to_string(ids[j]) + " twice");
        check_masses(kernels, layout, rows, i, k, k > 0 ? rows.logprobs[i * layout.kept] : 0, rounding_read,
                     [&](double temperature, double mass) {
                         corrupt("token " + std::to_string(i) + " of a block has a mass of " + std::to_string(mass) +
                                 " at temperature " + std::to_string(temperature) + ", more than 1");
                     });
    }
}

}  // namespace kdfast::cache
