// A fork-safe pool of threads and one way to use it.
#pragma once

#include <cstdint>
#include <functional>

namespace kdfast {

// Calls task(i) once for every i in [0, count), on up to `threads` threads, the caller's included; returns when all are
// done and rethrows the first exception. Which thread runs which task is not defined, so results must not depend on it.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task);

}  // namespace kdfast
