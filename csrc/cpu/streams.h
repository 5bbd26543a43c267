// What memory alone decides: the triad, and scaling in place. Included by dense_kernel.cpp, once per ISA.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

void triad(const float* a, const float* b, float* out, std::int64_t count, int threads) {
    constexpr std::int64_t block = 1 << 16;
    parallel_for((count + block - 1) / block, threads, [&](std::int64_t index) {
        const std::int64_t begin = index * block, n = std::min(block, count - begin);
        Buffers buffers;
        for (std::int64_t start = begin; start < begin + n; start += tile) {
            const std::int64_t size = std::min(tile, begin + n - start);
            std::int64_t i = 0;
            for (; i + width <= size; i += width) store(buffers.g + i, load(a + start + i) + load(b + start + i));
            for (; i < size; ++i) buffers.g[i] = a[start + i] + b[start + i];
            stream_out(out + start, buffers.g, size);
        }
        fence();
    });
}

void scale(const Rows& data, std::int64_t rows, float factor, int threads) {
    parallel_for(rows, threads, [&](std::int64_t i) {
        Buffers b;
        for (std::int64_t start = 0; start < data.columns; start += tile) {
            const std::int64_t n = std::min(tile, data.columns - start);
            const float* x = load_tile(data.row(i), data.dtype, start, n, b.z);
            for (std::int64_t j = 0; j < n; j += width) store(b.g + j, load(x + j) * set1(factor));
            store_tile(data.dtype, data.row(i), start, b.g, n, b.t, true);
        }
        fence();
    });
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
