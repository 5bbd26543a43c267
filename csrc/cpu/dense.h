// The dense distillation loss on the CPU: what a call is, and the entry point that every ISA provides.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/tensor.h"
#include "cpu/select.h"

namespace kdfast::cache {
struct Kernels;
}

namespace kdfast::cpu {

// The order is that of the names below; nothing outside this file knows the numbers.
enum class Divergence : std::uint8_t {
    forward_kl,
    reverse_kl,
    jsd,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
    alpha_div,
    hellinger,
};
inline constexpr std::array<std::string_view, 8> divergence_names = {
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha_div", "hellinger",
};

struct Term {
    Divergence kind;
    float weight;
    float parameter;  // beta, lam or a
};

// A label that is not to be read: the token is unlabelled and its cross-entropy 0.
inline constexpr std::int64_t no_label = INT64_MIN;
// A label in a column that somebody else holds: its cross-entropy has a gradient here, and no column of its own.
inline constexpr std::int64_t label_elsewhere = INT64_MIN + 1;

// What a teacher's K kept columns say of those that were not kept.
enum class TailRule : std::uint8_t {
    bucket,  // they are one outcome more, with the mass that the kept ones leave
    renorm,  // they have none: what was kept is scaled to 1
    zero,    // they are left out: sum over the kept columns of q (log q - log p)
    drawn,   // the kept ones were drawn: the sum of their weights times -log p, and negative entropy
};
inline constexpr std::array<std::string_view, 4> tail_rule_names = {"bucket", "renorm", "zero", "drawn"};

// A teacher given by K columns a row. Arrays are (rows, kept) and (rows), contiguous.
struct SparseTargets {
    const std::int32_t* ids = nullptr;  // null: no such teacher. Below 0: no entry; columns beyond the distilled ones
                                        // are not kept
    const float* values = nullptr;      // log q at temperature 1, nats; of drawn ones, their weight
    const float* per_row = nullptr;     // logsumexp of (log q / temperature), null: 0; of drawn ones, negative entropy
    std::int64_t kept = 0;
    std::int64_t columns = 0;  // of the teacher: ids lie below
    TailRule rule = TailRule::bucket;
};

// How logits follow from what is stored of them, x: softcap tanh(scale x / softcap), or scale x without a softcap. A
// column of -inf stays one, and has no gradient.
struct Cap {
    float scale = 1;
    float softcap = 0;  // 0: none
};

// One call. With z a student's row, t_k its teachers' rows, per row:
//   soft = sum of weight * D(q, p) over the terms;  q, p = softmax of (t, z) / temperature over the first `columns`
//   hard = cross-entropy of softmax(z) over all columns;  z2 = logsumexp(z)^2
//   grad = c_soft * dsoft/dz + c_hard * dhard/dz + c_z * dz2/dz
// Pointers to per-row values are contiguous; null where there is no such value.
struct DenseCall {
    std::int64_t rows = 0;
    std::int64_t columns = 0;  // of the distillation term; <= student.columns
    Rows student;
    Cap student_cap;  // the gradient is that of what is stored
    std::vector<Rows> teachers;
    std::vector<Cap> teacher_caps;  // as many as teachers, or none where all are stored as they are
    const float* teacher_weights =
        nullptr;  // teacher k of row i: [k * teacher_weights_stride + i * teacher_weights_per_row]
    std::int64_t teacher_weights_stride = 0;
    std::int64_t teacher_weights_per_row = 0;  // 0: the same for every row
    bool mix_logits = false;                   // q = softmax(sum w_k t_k / tau), not sum w_k softmax(t_k / tau)
    SparseTargets sparse;                      // in place of teachers
    std::vector<Term> terms;                   // at least one where there is a teacher
    double temperature = 1;
    const std::int64_t* labels = nullptr;
    const bool* counted = nullptr;  // null: every row counts
    float label_smoothing = 0;

    // Forward: any of them may be null. stats is (rows, stats_per_row()) and enough to compute the gradient later.
    float* soft = nullptr;
    float* hard = nullptr;
    float* z2 = nullptr;
    float* dsoft_dtemperature = nullptr;
    float* stats = nullptr;
    // (rows, observed_per_row): columns of the student's largest logit, of all and of the distilled ones, and the
    // entropy of p, nats; the same two of the teacher's distribution. Of equal logits the lowest column; where none
    // is finite, or there are no teachers, a number below 0, which is not the same for student and teacher.
    double* observed = nullptr;
    static constexpr std::int64_t observed_per_row = 5;
    static constexpr double no_top = -1, no_top_of_teacher = -2;

    // Of the passes one by one, where several callers hold a shard of the columns each: the sum of the logits that are
    // not -inf, and the row's sums of pass 2.
    float* logit_sum = nullptr;
    float* values = nullptr;  // (rows, values_per_row)
    bool values_with_dtemperature = false;
    static constexpr std::int64_t values_per_row = 7;  // value; student, student u, p u; teacher, teacher v, q v

    // Gradient: data == nullptr for none. It may be the student's own memory.
    Rows grad;
    const float* c_soft = nullptr;
    const float* c_hard = nullptr;
    const float* c_z = nullptr;

    bool grad_is_read = false;  // soon after the call, from the cache

    int threads = 1;

    // The same call of these rows alone, but for the logits and the gradient, which are the caller's to set.
    DenseCall part(std::int64_t first, std::int64_t count) const;
    bool taught() const { return !teachers.empty() || sparse.ids; }
    // Teachers whose softmax is taken: a mixture of logits has one.
    std::int64_t distributions() const {
        return mix_logits && !teachers.empty() ? 1 : static_cast<std::int64_t>(teachers.size());
    }
    // Whether the sign of p - q has to be right, which takes sums in fp64; of an ensemble's distributions it is not.
    bool sided() const {
        const auto signs = [](const Term& t) { return t.kind == Divergence::tvd; };
        return distributions() == 1 && std::any_of(terms.begin(), terms.end(), signs);
    }
    static constexpr std::int64_t state_size = 6;  // of a row, in floats
    std::int64_t stats_per_row() const { return state_size + 2 * distributions() + (sided() ? 4 : 0); }
};

// Throws ArgumentError for a label out of range or a temperature not above 0.
void check(const DenseCall& call);

// Forward and, where grad is set, the gradient in the same call. Checks the call before it writes anything.
using DenseForward = void (*)(const DenseCall&);
// The gradient from the stats of an earlier forward call.
using DenseBackward = void (*)(const DenseCall&);
// Pass 1 alone: writes stats, but for the sum that pass 2 finds, and logit_sum.
using DenseSums = void (*)(const DenseCall&);
// Pass 2 alone: reads stats and writes values.
using DenseValues = void (*)(const DenseCall&);
// out[i] = a[i] + b[i], non-temporal where the ISA can: the two-read, one-write bandwidth that the losses are held
// against.
using Triad = void (*)(const float* a, const float* b, float* out, std::int64_t count, int threads);
// data[i] *= factor
using Scale = void (*)(const Rows& data, std::int64_t rows, float factor, int threads);

struct Kernels {
    std::string_view isa;
    DenseForward forward;
    DenseBackward backward;
    DenseSums sums;
    DenseValues values;
    Triad triad;
    Scale scale;
    const SelectKernels* select;
    const cache::Kernels* cache;
};

extern const Kernels generic_kernels;
#if defined(KDFAST_X86)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

}  // namespace kdfast::cpu
