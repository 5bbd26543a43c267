#include "cache/rows/prove.h"

#include <algorithm>
#include <string>

#include "cache/rows/fields.h"
#include "cache/rows/mass.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
namespace {

void prove_mass(const Layout& layout, const Source& rows, std::int64_t token, std::int64_t k) {
    const float* logprobs = rows.logprobs + token * layout.kept;
    const auto at = [&](double temperature, float lse) {
        const double mass =
            mass_beyond(*cpu::kernels().cache, logprobs, k, logprobs[0], 1 / temperature, lse, rounding_read);
        if (mass != 0)
            corrupt("token " + std::to_string(token) + " of a block has a mass of " + std::to_string(mass) +
                    " at temperature " + std::to_string(temperature) + ", more than 1");
    };
    at(1, 0);
    for (std::size_t i = 0; i < layout.temperatures.size(); ++i)
        at(layout.temperatures[i], rows.lse[static_cast<std::int64_t>(i) * rows.lse_stride + token]);
}

}  // namespace

void prove(const Layout& layout, const Source& rows) {
    if (layout.codec == Codec::drawn) return;  // whose ids rise, and whose draws decoding counts
    thread_local Columns columns;
    for (std::int64_t i = 0; i < rows.tokens; ++i) {
        const std::int32_t* ids = rows.ids + i * layout.kept;
        std::int64_t k = layout.kept;
        if (layout.ragged) k = rows.k_eff ? rows.k_eff[i] : std::find(ids, ids + k, -1) - ids;
        if (const std::int64_t j = columns.twice(ids, k, layout.vocab_size); j >= 0)
            corrupt("token " + std::to_string(i) + " of a block has id " + std::to_string(ids[j]) + " twice");
        prove_mass(layout, rows, i, k);
    }
}

}  // namespace kdfast::cache
