// How one call's rows are read, tile by tile. Included by dense_kernel.cpp, once per ISA.
#pragma once

namespace kdfast::cpu::KDFAST_ISA {
namespace {

constexpr std::int64_t segment = 8 * tile;  // columns under one partial sum: the unit of work when rows are few

class CallTiles {
  protected:
    // `specialised`: the divergence is compiled for logits of one dtype, read where they lie.
    CallTiles(const DenseCall& call, bool specialised)
        : a_(call),
          inv_tau_(call.taught() ? 1 / static_cast<float>(call.temperature) : 1),  // of no matter without a teacher
          c_(inv_tau_ * log2e),
          exact_c_(log2e_exact / call.temperature),
          taught_(call.taught() ? call.columns : call.student.columns),
          distributions_(call.distributions()) {
        const bool one_dtype =
            a_.teachers.empty() || (specialised && a_.teachers.size() == 1 && a_.teachers[0].dtype == a_.student.dtype);
        bool as_stored = plain(a_.student_cap);
        for (const Cap& cap : a_.teacher_caps) as_stored = as_stored && plain(cap);
        direct_ = one_dtype && as_stored && a_.student.dtype != DType::f16;
        // A short row is in the nearest cache still; over 16-bit logits, a stream took up to seven times as long.
        streamed_ = !a_.grad_is_read && a_.student.columns > tile &&
                    (a_.grad.data != a_.student.data || a_.student.dtype == DType::f32);
    }

    bool counted(std::int64_t i) const { return !a_.counted || a_.counted[i]; }
    bool labelled(std::int64_t i) const { return a_.labels && a_.labels[i] != no_label; }

    float teacher_weight(std::int64_t k, std::int64_t i) const {
        return a_.teacher_weights[k * a_.teacher_weights_stride + i * a_.teacher_weights_per_row];
    }

    // Logits, which for a capped student lie in b.z.
    const float* student_tile(std::int64_t i, std::int64_t begin, std::int64_t n, Buffers& b) const {
        return logits_tile(a_.student, a_.student_cap, i, begin, n, b.z);
    }

    static const float* logits_tile(const Rows& rows, const Cap& cap, std::int64_t i, std::int64_t begin,
                                    std::int64_t n, float* buffer) {
        const float* x = load_tile(rows.row(i), rows.dtype, begin, n, buffer);
        return plain(cap) ? x : apply(cap, x, padded(n), buffer);
    }

    Cap teacher_cap(std::size_t k) const { return a_.teacher_caps.empty() ? Cap{} : a_.teacher_caps[k]; }

    // Logits of distribution k: a teacher's own, or the weighted sum of all.
    const float* teacher_tile(std::int64_t k, std::int64_t i, std::int64_t begin, std::int64_t n, Buffers& b) const {
        if (!a_.mix_logits) return logits_tile(a_.teachers[k], teacher_cap(k), i, begin, n, b.t);
        const std::int64_t size = padded(n);
        std::fill_n(b.mix, size, 0.0f);
        for (std::size_t j = 0; j < a_.teachers.size(); ++j) {
            const float w = teacher_weight(static_cast<std::int64_t>(j), i);
            if (w == 0) continue;
            const float* t = logits_tile(a_.teachers[j], teacher_cap(j), i, begin, n, b.t);
            for (std::int64_t c = 0; c < size; c += width) store(b.mix + c, fma(set1(w), load(t + c), load(b.mix + c)));
        }
        return b.mix;
    }

    // log2 sum_k w_k q_k, from the largest summand on: a q too small for fp32 still has its logarithm.
    const float* ensemble_tile(std::int64_t i, std::int64_t begin, std::int64_t n,
                               const std::vector<Normaliser>& teachers, Buffers& b) const {
        const std::int64_t size = padded(n);
        const auto each = [&](auto use) {
            for (std::int64_t k = 0; k < distributions_; ++k) {
                const float w = teacher_weight(k, i);
                if (w == 0) continue;
                const float* t = teacher_tile(k, i, begin, n, b);
                const V c = set1(c_), from = set1(-teachers[k].hi), shift = set1(std::log2(w) - teachers[k].lo);
                for (std::int64_t j = 0; j < size; j += width) use(j, affine(load(t + j), c, from) + shift);
            }
        };
        const auto finite = [](V x) { return select(equal(x, set1(-infinity)), set1(0), x); };
        std::fill_n(b.mix, size, -infinity);
        each([&](std::int64_t j, V v) { store(b.mix + j, max(load(b.mix + j), v)); });
        std::fill_n(b.g, size, 0.0f);
        each([&](std::int64_t j, V v) { store(b.g + j, load(b.g + j) + exp2(v - finite(load(b.mix + j)))); });
        for (std::int64_t j = 0; j < size; j += width) store(b.mix + j, finite(load(b.mix + j)) + log2(load(b.g + j)));
        return b.mix;
    }

    template <class Visit>
    static void for_tiles(std::int64_t begin, std::int64_t end, Visit visit) {
        for (std::int64_t start = begin; start < end; start += tile) visit(start, std::min(tile, end - start));
    }

    // Calls taught(start, n) for the tiles of a segment that the distillation term sees, rest(start, n) for the others.
    template <class Taught, class Rest>
    void for_segment(std::int64_t s, Taught taught, Rest rest) const {
        const std::int64_t begin = s * segment, end = std::min(begin + segment, a_.student.columns);
        const std::int64_t middle = std::clamp(taught_, begin, end);
        for_tiles(begin, middle, taught);
        for_tiles(middle, end, rest);
    }

    static bool in_tile(std::int64_t label, std::int64_t start, std::int64_t n) {
        return label >= start && label < start + n;
    }

    template <class Io>
    static typename Io::Element* columns(std::byte* row, std::int64_t start) {
        return reinterpret_cast<typename Io::Element*>(row) + start;
    }
    template <class Io>
    static const typename Io::Element* columns(const std::byte* row, std::int64_t start) {
        return reinterpret_cast<const typename Io::Element*>(row) + start;
    }

    // Calls f with what reads and writes the logits' dtype directly.
    template <class F>
    void with_io(F f) const {
        a_.student.dtype == DType::f32 ? f.template operator()<DirectFloat>() : f.template operator()<DirectBf16>();
    }

    // What the next row will read first, fetched while this one's later passes compute.
    Ahead next_row(const Rows& rows, std::int64_t i, std::int64_t start) const {
        const std::int64_t column =
            a_.student.columns - start;  // later passes run from the end, the first from the beginning
        if (i + 1 == a_.rows || column == a_.student.columns) return {rows.row(i), 0};
        return Ahead::of(rows.row(i + 1), rows.dtype, column);
    }

    const DenseCall& a_;
    const float inv_tau_;
    const float c_;              // log2e / tau
    const double exact_c_;       // the same, without fp32's rounding
    const std::int64_t taught_;  // columns under the distillation term, or all
    const std::int64_t distributions_;
    bool streamed_;  // the gradient is written past the cache
    bool direct_;    // student and teacher can be read, and the gradient written, without the detour through tiles
};

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
