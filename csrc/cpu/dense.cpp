// The part of the dense loss that is compiled for every CPU alike: units for one instruction set must not instantiate
// functions of the standard library, as the linker may keep their copy for all.
#include "cpu/dense.h"

#include <string>
#include <vector>

#include "core/error.h"

namespace kdfast::cpu {
namespace {

// A bit a column finds an id that stands twice at the price of two passes over a few hundred bytes.
void check_ids(const DenseCall& call) {
    const SparseTargets& s = call.sparse;
    std::vector<std::uint64_t> seen(static_cast<std::size_t>((s.columns + 63) / 64));
    for (std::int64_t i = 0; i < call.rows; ++i) {
        if (call.counted && !call.counted[i]) continue;
        const std::int32_t* ids = s.ids + i * s.kept;
        std::int64_t bad = -1, twice = -1;
        for (std::int64_t k = 0; k < s.kept; ++k) {
            const std::int64_t id = ids[k];
            if (id < -1 || id >= s.columns) {
                bad = k;
                break;
            }
            if (id < 0) continue;
            std::uint64_t& word = seen[static_cast<std::size_t>(id / 64)];
            const std::uint64_t bit = std::uint64_t{1} << (id % 64);
            if (word & bit) twice = k;
            word |= bit;
        }
        if (bad >= 0)
            throw ArgumentError("teacher: ids must be in [0, " + std::to_string(s.columns) +
                                "), or -1 beyond k_eff, got " + std::to_string(ids[bad]));
        if (twice >= 0)
            throw ArgumentError("teacher: ids hold duplicates within a token: " + std::to_string(ids[twice]) +
                                " stands there twice");
        for (std::int64_t k = 0; k < s.kept; ++k)
            if (ids[k] >= 0) seen[static_cast<std::size_t>(ids[k] / 64)] = 0;
    }
}

}  // namespace

DenseCall DenseCall::part(std::int64_t first, std::int64_t count) const {
    DenseCall p = *this;
    p.rows = count;
    const auto skip = [first](auto*& per_row, std::int64_t size) {
        if (per_row) per_row += first * size;
    };
    skip(p.teacher_weights, teacher_weights_per_row);
    skip(p.sparse.ids, sparse.kept);
    skip(p.sparse.values, sparse.kept);
    skip(p.sparse.per_row, 1);
    skip(p.labels, 1);
    skip(p.counted, 1);
    for (float** per_row : {&p.soft, &p.hard, &p.z2, &p.dsoft_dtemperature, &p.logit_sum}) skip(*per_row, 1);
    for (const float** per_row : {&p.c_soft, &p.c_hard, &p.c_z}) skip(*per_row, 1);
    skip(p.stats, stats_per_row());
    skip(p.observed, observed_per_row);
    skip(p.values, values_per_row);
    return p;
}

void check(const DenseCall& call) {
    if (!(static_cast<float>(call.temperature) > 0))
        throw ArgumentError("temperature must be > 0, got " + std::to_string(call.temperature));
    if (call.dsoft_dtemperature && call.distributions() > 1)
        throw ArgumentError("the temperature's gradient is not provided for an ensemble of distributions");
    if (call.sparse.ids) check_ids(call);
    if (!call.labels) return;
    for (std::int64_t i = 0; i < call.rows; ++i) {
        const std::int64_t y = call.labels[i];
        if ((call.counted && !call.counted[i]) || y == no_label || (y == label_elsewhere && !call.hard) ||
            (y >= 0 && y < call.student.columns))
            continue;
        throw ArgumentError("labels must be in [0, " + std::to_string(call.student.columns) +
                            ") or ignore_index, got " + std::to_string(y));
    }
}

}  // namespace kdfast::cpu
