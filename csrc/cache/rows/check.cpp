#include "cache/rows/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cache/kernels.h"
#include "cache/rows/drawn.h"
#include "cache/rows/fields.h"
#include "cache/rows/mass.h"
#include "cpu/dispatch.h"

namespace kdfast::cache {
namespace {

void check_gold(const Layout& layout, const Source& t) {
    if (!layout.gold) return;
    if (!t.gold) throw ArgumentError("a layout with gold needs gold");
    for (std::int64_t i = 0; i < t.tokens; ++i)
        if (!(t.gold[i] <= 0)) refuse(i, "gold is " + std::to_string(t.gold[i]) + ", not a log-probability");
}

// A fixed block moves an lse by less than the half that is left here, so that what it stores is finite, too.
void check_lse(const Layout& layout, const Source& t) {
    constexpr float most = std::numeric_limits<float>::max() / 2;
    for (std::size_t at = 0; at < layout.temperatures.size(); ++at)
        for (std::int64_t i = 0; i < t.tokens; ++i) {
            const float lse = t.lse[static_cast<std::int64_t>(at) * t.lse_stride + i];
            if (!(std::abs(lse) <= most))
                refuse(i, "lse at temperature " + std::to_string(layout.temperatures[at]) + " is " +
                              std::to_string(lse) + ", not below 2^127 in size");
        }
}

void check_ids(const Layout& layout, Columns& columns, std::int64_t token, const std::int32_t* ids, std::int64_t k) {
    std::uint32_t largest = 0;
    for (std::int64_t j = 0; j < k; ++j) largest = std::max(largest, static_cast<std::uint32_t>(ids[j]));
    for (std::int64_t j = 0; largest >= layout.vocab_size && j < k; ++j)
        if (static_cast<std::uint32_t>(ids[j]) >= layout.vocab_size)
            refuse(token, j, "id " + std::to_string(ids[j]) + " is not below " + std::to_string(layout.vocab_size));
    if (const std::int64_t j = columns.twice(ids, k, layout.vocab_size); j >= 0)
        refuse(token, j, "id " + std::to_string(ids[j]) + " is there twice");
}

// The largest. Without a branch on an entry, which a compiler could not make wide.
float check_logprobs(std::int64_t token, const float* logprobs, std::int64_t k, std::uint32_t grid) {
    unsigned illegal = 0;
    float top = std::numeric_limits<float>::lowest(), least = 0;
    for (std::int64_t j = 0; j < k; ++j) {
        illegal |= !finite_log(logprobs[j]);
        top = std::max(top, logprobs[j]);
        least = std::min(least, logprobs[j]);
    }
    for (std::int64_t j = 0; illegal != 0 && j < k; ++j)
        if (!finite_log(logprobs[j]))
            refuse(token, j, "logprob is " + std::to_string(logprobs[j]) + ", not finite and at most 0");
    if (k > 0 && std::nearbyint(std::ldexp(double{top} - least, static_cast<int>(grid))) >= steps_limit)
        refuse(token, "entries are 2^" + std::to_string(24 - grid) + " nats or more below the first");
    return top;
}

void check_draws(std::int64_t token, const float* mass, std::int64_t k, double draws) {
    constexpr double rounding = 0x1p-22;  // of a division, or of a product with 1 / N, in f32
    double drawn = 0;
    for (std::int64_t j = 0; j < k; ++j) {
        const double n = std::nearbyint(mass[j] * draws);
        if (!(n >= 1 && n <= draws) || std::abs(mass[j] * draws - n) > n * rounding)
            refuse(token, j, "mass is " + std::to_string(mass[j]) + ", not a multiple of 1 / " + std::to_string(draws));
        drawn += n;
    }
    if (drawn > draws)
        refuse(token, "its entries were drawn " + std::to_string(static_cast<std::int64_t>(drawn)) + " times of " +
                          std::to_string(static_cast<std::int64_t>(draws)));
}

void check_weights(std::int64_t token, const float* mass, std::int64_t k, std::uint32_t grid) {
    if (k == 0) return;
    const float* most = std::max_element(mass, mass + k);
    const double nats = std::log(double{*most} / *std::min_element(mass, mass + k));
    if (std::nearbyint(std::ldexp(nats, static_cast<int>(grid))) > std::ldexp(most_nats, static_cast<int>(grid)))
        refuse(token, most - mass, "mass is " + std::to_string(*most) + ", more than e^104 times the least");
}

}  // namespace

void check_fixed(const Layout& layout, const Source& t) {
    if (!t.ids || !t.logprobs || (!layout.temperatures.empty() && !t.lse))
        throw ArgumentError("the fixed codec needs ids, logprobs and an lse for each temperature but 1");
    const Widths widths(layout, t);
    check_lse(layout, t);
    const Kernels& kernels = *cpu::kernels().cache;
    thread_local Columns columns;
    for (std::int64_t i = 0; i < t.tokens; ++i) {
        const std::int64_t k = widths[i], row = i * layout.kept;
        const float top = check_logprobs(i, t.logprobs + row, k, layout.grid);
        check_ids(layout, columns, i, t.ids + row, k);
        check_masses(kernels, layout, t, i, k, top, rounding_written, [&](double temperature, double mass) {
            refuse(i, "its entries have a mass of " + std::to_string(mass) + " at temperature " +
                          std::to_string(temperature) + ", more than 1");
        });
    }
    check_gold(layout, t);
}

void check_drawn(const Layout& layout, const Source& t) {
    if (!t.ids || !t.mass || !t.neg_entropy || (!layout.temperatures.empty() && !t.lse))
        throw ArgumentError("the drawn codec needs ids, mass, neg_entropy and an lse for each temperature but 1");
    const Widths widths(layout, t);
    thread_local Columns columns;
    for (std::int64_t i = 0; i < t.tokens; ++i) {
        const std::int64_t k = widths[i], row = i * layout.kept;
        check_ids(layout, columns, i, t.ids + row, k);
        for (std::int64_t j = 0; j < k; ++j) {
            const float mass = t.mass[row + j];
            if (!(mass > 0) || !finite(mass))
                refuse(i, j, "mass is " + std::to_string(mass) + ", not finite and above 0");
        }
        if (layout.method == Method::sample)
            check_draws(i, t.mass + row, k, layout.draws);
        else
            check_weights(i, t.mass + row, k, layout.grid);
        if (!finite_log(t.neg_entropy[i]))
            refuse(i, "neg_entropy is " + std::to_string(t.neg_entropy[i]) + ", not finite and at most 0");
    }
    check_lse(layout, t);
    check_gold(layout, t);
}

}  // namespace kdfast::cache
