// The part of the dense loss that is compiled for every CPU alike: units for one instruction set must not instantiate
// functions of the standard library, as the linker may keep their copy for all.
#include "cpu/dense.h"

#include <string>

#include "core/error.h"

namespace kdfast::cpu {

void check(const DenseCall& call) {
    if (!(call.temperature > 0))
        throw ArgumentError("temperature must be > 0, got " + std::to_string(call.temperature));
    if (call.dsoft_dtemperature && call.distributions() > 1)
        throw ArgumentError("the temperature's gradient is not provided for an ensemble of distributions");
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
