// The dense loss for one ISA; compiled once per row of dispatch.cpp's table, with KDFAST_ISA naming the namespace.
//
// A row is read twice (three times where the divergence's normaliser is not known after the first pass), and stays in
// cache in between: memory sees each logit once and each gradient once, written past the cache.
//
//   pass 1  maxima and sums of exponentials of the student and of each teacher, and forward and reverse KL's value; for
//           the total variation the sums in fp64, too (sides.h)
//                                                                                       -> RowState
//   pass 2  the divergence's value and, where unknown so far, sum student(column)
//   pass 3  the gradient; a KL too small for pass 1's value has pass 2 in it
//
// Order of summation: fp32 lanes within a tile, fp64 across tiles, segments combined by number. Rows go to threads
// whole; where there are fewer rows than threads, segments do, pass by pass. Both ways sum in the same order, so the
// result has the same bits for any number of threads. Beside its outputs a call needs a few tiles a thread and a few
// numbers a segment.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cache/kernels.h"
#include "core/threads.h"
#include "cpu/dense.h"

// clang-format off: the order matters
#if defined(KDFAST_ISA_AVX512_BF16)
#define KDFAST_ISA avx512_bf16
#include "cpu/simd_avx512.h"
#elif defined(KDFAST_ISA_AVX512)
#define KDFAST_ISA avx512
#include "cpu/simd_avx512.h"
#elif defined(KDFAST_ISA_AVX2)
#define KDFAST_ISA avx2
#include "cpu/simd_avx2.h"
#else
#define KDFAST_ISA generic
#include "cpu/simd_generic.h"
#endif
#include "cpu/divergences.h"
#include "cpu/tiles.h"
#include "cpu/sides.h"
#include "cpu/passes.h"
#include "cpu/sparse.h"
#include "cpu/call_tiles.h"
#include "cpu/streams.h"
// clang-format on

namespace kdfast::cpu::KDFAST_ISA {
namespace {

// The divergences that most calls use: these are compiled for every way to get softmax(z) and to read and write; the
// others take the general way of each.
template <class D>
constexpr bool specialised = std::is_same_v<D, ForwardKl> || std::is_same_v<D, ReverseKl> || std::is_same_v<D, Jsd>;

// The two whose value pass 1 has as sum a (log a - log b): its rounding is that of terms with either sign, which may
// cancel, so that the value has a rounding error of about 1e-7 times one nat more.
template <class D>
constexpr bool crossed = std::is_same_v<D, ForwardKl> || std::is_same_v<D, ReverseKl>;
// Nats from which on that is enough. A smaller one is summed anew, of terms that are never below 0.
constexpr double plain_is_enough = 0.125;

// Nats of a cross-entropy up to which the label's exponential is a good part of the sum of all.
constexpr double sum_beside_label = 0.5;

enum class Passes : std::uint8_t { all, sums, values, gradient };

template <class D>
class Call : CallTiles {
  public:
    Call(const DenseCall& call, D divergence, float weight)
        : CallTiles(call, specialised<D>), divergence_(divergence), weight_(weight), sided_(call.sided()) {
        segments_ = (a_.student.columns + segment - 1) / segment;
        // Of a shard, sums are asked for before it is known who holds the label.
        const bool needs_softmax_at_one = a_.labels || a_.z2 || a_.c_hard || a_.c_z || a_.logit_sum;
        tau_ = !needs_softmax_at_one || inv_tau_ == 1 ? Tau::one : inv_tau_ == 0.5f ? Tau::two : Tau::other;
        // The reverse KL's normaliser needs log q in pass 1, which an ensemble of distributions does not have yet.
        sum_student_known_ = std::is_same_v<D, ForwardKl> || (std::is_same_v<D, ReverseKl> && distributions_ == 1);
    }

    void run(Passes passes) {
        from_logits_ = passes == Passes::all || passes == Passes::sums;
        wants_gradient_ = a_.grad.data != nullptr;
        wants_dtau_ = a_.dsoft_dtemperature != nullptr || a_.values_with_dtemperature;
        joint_ = sum_student_known_ && wants_gradient_ && !wants_dtau_;
        value_pass_ = !a_.teachers.empty() && (passes == Passes::values || (passes == Passes::all && !joint_));
        if (a_.rows >= a_.threads || segments_ == 1) {
            run_rows();
        } else {
            run_segments();
        }
    }

  private:
    struct Row {  // a row's partial results, by segment, and what they combine to
        std::vector<SegmentSums> sums;
        std::vector<Sums> teacher_sums;  // by segment, then distribution
        std::vector<ExactSums> exact;    // by segment, where the call asks for sides
        std::vector<Value> values;
        RowState state;
        std::vector<Normaliser> teachers;  // by distribution
        struct {
            Normaliser student, teacher;
        } sides;           // the exact sums' log2
        bool value_known;  // after pass 1
        double value;
        Kept kept;

        Row(std::int64_t segments, std::int64_t distributions, std::int64_t kept_columns, bool sided)
            : sums(segments),
              teacher_sums(segments * distributions),
              exact(sided ? segments : 0),
              values(segments),
              state(),
              teachers(distributions),
              sides(),
              value_known(false),
              value(0),
              kept(kept_columns) {}
    };

    template <class Task>
    void parallel(std::int64_t tasks, Task task) const {
        parallel_for(tasks, a_.threads, [&](std::int64_t index) {
            const FlushDenormals flush;
            task(index);
            fence();
        });
    }

    void run_rows() {
        // Several rows a task where rows are short: they are less work than fetching a task.
        const std::int64_t fair = std::max<std::int64_t>(1, a_.rows / (8 * a_.threads));
        const std::int64_t group = std::clamp<std::int64_t>(64 * segment / a_.student.columns, 1, fair);
        parallel((a_.rows + group - 1) / group, [&](std::int64_t index) {
            Row row(segments_, distributions_, a_.sparse.kept, sided_);
            const std::int64_t end = std::min(a_.rows, (index + 1) * group);
            for (std::int64_t i = index * group; i < end; ++i) run_row(i, row);
        });
    }

    // Later passes go through the row from its end, which is what the cache still holds.
    void run_row(std::int64_t i, Row& row) const {
        if (!counted(i)) return drop_row(i);
        if (from_logits_)
            for (std::int64_t s = 0; s < segments_; ++s) sum_segment(i, row, s);
        begin_row(i, row);
        if (wants_value_pass(row)) {
            for (std::int64_t s = segments_; s-- > 0;) value_segment(i, row, s);
            finish_value(row);
        }
        if (wants_gradient_)
            for (std::int64_t s = segments_; s-- > 0;) gradient_segment(i, row, s);
        finish_row(i, row);
    }

    void run_segments() {
        std::vector<Row> rows(a_.rows, Row(segments_, distributions_, a_.sparse.kept, sided_));
        const auto each_segment = [&](auto task) {
            parallel(a_.rows * segments_, [&](std::int64_t index) {
                const std::int64_t i = index / segments_;
                if (counted(i)) task(i, rows[i], index % segments_);
            });
        };
        if (from_logits_) each_segment([&](std::int64_t i, Row& row, std::int64_t s) { sum_segment(i, row, s); });
        const auto each_row = [&](auto task) {  // here, not around parallel(): a thread starts with its maker's flags
            const FlushDenormals flush;
            for (std::int64_t i = 0; i < a_.rows; ++i) task(i, rows[i]);
        };
        each_row([&](std::int64_t i, Row& row) { counted(i) ? begin_row(i, row) : drop_row(i); });
        if (value_pass_) {
            each_segment([&](std::int64_t i, Row& row, std::int64_t s) {
                if (wants_value_pass(row)) value_segment(i, row, s);
            });
            for (Row& row : rows) finish_value(row);
        }
        if (wants_gradient_)
            each_segment([&](std::int64_t i, Row& row, std::int64_t s) { gradient_segment(i, row, s); });
        each_row([&](std::int64_t i, const Row& row) {
            if (counted(i)) finish_row(i, row);
        });
    }

    bool wants_value_pass(const Row& row) const { return value_pass_ && (wants_dtau_ || !row.value_known); }
    void drop_row(std::int64_t i) const {
        for (float* out : {a_.soft, a_.hard, a_.z2, a_.dsoft_dtemperature, a_.logit_sum})
            if (out) out[i] = 0;
        if (a_.observed) std::fill_n(a_.observed + i * a_.observed_per_row, a_.observed_per_row, 0.0);
        if (a_.values) std::fill_n(a_.values + i * a_.values_per_row, a_.values_per_row, 0.0f);
        if (a_.stats && from_logits_) std::fill_n(a_.stats + i * a_.stats_per_row(), a_.stats_per_row(), 0.0f);
        if (wants_gradient_)
            std::memset(a_.grad.row(i), 0, static_cast<std::size_t>(a_.grad.columns) * size_of(a_.grad.dtype));
    }

    // --- Pass 1

    void sum_segment(std::int64_t i, Row& row, std::int64_t s) const {
        Buffers b;
        SegmentSums out;
        ExactSums exact;
        Sums* teachers = row.teacher_sums.data() + s * distributions_;
        std::fill_n(teachers, distributions_, Sums{});
        const std::byte* student = a_.student.row(i);
        for_segment(
            s,
            [&](std::int64_t start, std::int64_t n) {
                const Ahead next = Ahead::of(student, a_.student.dtype, start + tile);
                if (direct_) {
                    with_io([&]<class Io>() { sum_direct<Io>(i, start, n, teachers, out.student); });
                } else if (distributions_ == 1) {
                    const float *z = student_tile(i, start, n, b), *t = teacher_tile(0, i, start, n, b);
                    sum_both<ThroughTile>(z, t, start, padded(n), out.student, teachers[0], next, next);
                    if (sided_) {
                        exact.student.add(z, padded(n), out.student.max, exact_c_);
                        exact.teacher.add(t, padded(n), teachers[0].max, exact_c_);
                    }
                } else {
                    for (std::int64_t k = 0; k < distributions_; ++k)
                        add_tile<ThroughTile, Tau::one>(teacher_tile(k, i, start, n, b), start, padded(n), c_, false,
                                                        teachers[k], next);
                    sum_student<ThroughTile>(student_tile(i, start, n, b), start, padded(n), out.student, next);
                }
                if (a_.label_smoothing > 0)
                    add_smoothing(student_tile(i, start, n, b), padded(n), out.student, out.smoothing);
            },
            [&](std::int64_t start, std::int64_t n) {
                const float* z = student_tile(i, start, n, b);
                add_tile<ThroughTile, Tau::one>(z, start, padded(n), log2e, a_.observed, out.rest,
                                                Ahead::of(student, a_.student.dtype, start + tile));
                if (a_.label_smoothing > 0) add_smoothing(z, padded(n), out.rest, out.smoothing);
            });
        row.sums[s] = out;
        if (sided_) row.exact[s] = exact;
    }

    template <class Io>
    void sum_direct(std::int64_t i, std::int64_t start, std::int64_t n, Sums* teacher, Sums& student) const {
        const std::byte* z = a_.student.row(i);
        const Ahead next_z = Ahead::of(z, a_.student.dtype, start + tile);
        if (a_.teachers.empty()) return sum_student<Io>(columns<Io>(z, start), start, n, student, next_z);
        const std::byte* t = a_.teachers[0].row(i);
        sum_both<Io>(columns<Io>(z, start), columns<Io>(t, start), start, n, student, *teacher, next_z,
                     Ahead::of(t, a_.student.dtype, start + tile));
    }

    template <class F>
    auto with_tau(F f) const {
        switch (tau_) {
            case Tau::one:
                return f.template operator()<Tau::one>();
            case Tau::two:
                return f.template operator()<Tau::two>();
            case Tau::other:
                return f.template operator()<Tau::other>();
        }
        __builtin_unreachable();
    }

    template <class Io>
    void sum_student(const typename Io::Element* z, std::int64_t start, std::int64_t n, Sums& sums, Ahead next) const {
        with_tau([&]<Tau T>() { add_tile<Io, T>(z, start, n, c_, a_.observed, sums, next); });
    }

    template <class Io>
    void sum_both(const typename Io::Element* z, const typename Io::Element* t, std::int64_t start, std::int64_t n,
                  Sums& student, Sums& teacher, Ahead next_z, Ahead next_t) const {
        constexpr Cross cross = std::is_same_v<D, ForwardKl>   ? Cross::teacher
                                : std::is_same_v<D, ReverseKl> ? Cross::student
                                                               : Cross::none;
        with_tau([&]<Tau T>() {
            add_pair<Io, T, cross>(z, t, start, n, c_, a_.observed, student, teacher, next_z, next_t);
        });
    }

    // Combines the segments to the row's state, or takes the state that an earlier call saved.
    void begin_row(std::int64_t i, Row& row) const {
        row.value_known = false;
        float* saved = a_.stats ? a_.stats + i * a_.stats_per_row() : nullptr;
        if (!from_logits_) {
            std::memcpy(&row.state, saved, sizeof(RowState));
            if (distributions_ > 0)
                std::memcpy(row.teachers.data(), saved + DenseCall::state_size,
                            row.teachers.size() * sizeof(Normaliser));
            if (sided_) std::memcpy(&row.sides, saved + sides_at, sizeof(row.sides));
            begin_sparse(i, row);
            return;
        }
        Sums student, rest;
        Smoothing smoothing;
        for (const SegmentSums& s : row.sums) {
            student.merge(s.student, c_);
            rest.merge(s.rest, log2e);
            smoothing.sum += s.smoothing.sum;
            smoothing.present += s.smoothing.present;
        }
        row.state = {};
        row.state.present = static_cast<float>(smoothing.present);
        const double log2_student = student.log2_at_tau(c_);
        row.state.at_tau = Normaliser::of(log2_student);
        for (std::int64_t k = 0; k < distributions_; ++k) {
            Sums t;
            for (std::int64_t s = 0; s < segments_; ++s) t.merge(row.teacher_sums[s * distributions_ + k], c_);
            const double log2_teacher = t.log2_at_tau(c_);
            row.teachers[k] = Normaliser::of(log2_teacher);
            if (!crossed<D> || distributions_ > 1) continue;
            constexpr bool reverse = std::is_same_v<D, ReverseKl>;
            const Sums& weights = reverse ? student : t;
            const double shift = reverse ? log2_teacher - log2_student : log2_student - log2_teacher;
            const double value = (weights.cross / weights.at_tau + shift) * static_cast<double>(ln2);
            if (reverse) row.state.sum_student = static_cast<float>(value);
            row.value_known = value >= plain_is_enough && value < infinity;
            row.value = value;
        }
        if (sided_) {
            ExactSums all;
            for (const ExactSums& s : row.exact) {
                all.student.merge(s.student, exact_c_);
                all.teacher.merge(s.teacher, exact_c_);
            }
            row.sides = {Normaliser::of(all.student.log2(exact_c_)), Normaliser::of(all.teacher.log2(exact_c_))};
        }
        if (std::is_same_v<D, ForwardKl>) row.state.sum_student = -1;
        if (a_.observed) observe(i, row, student, log2_student, rest);
        student.merge(rest, c_);
        row.state.at_one = Normaliser::of(student.log2_at_one());
        const double lse = student.logsumexp();
        if (a_.z2) a_.z2[i] = static_cast<float>(lse * lse);
        if (a_.logit_sum) a_.logit_sum[i] = static_cast<float>(smoothing.sum);
        if (a_.hard) a_.hard[i] = labelled(i) ? cross_entropy(i, lse, row, student, smoothing) : 0;
        begin_sparse(i, row);
    }

    // What the training log asks of a row, once its normalisers are known and before a gradient takes its place.
    void observe(std::int64_t i, const Row& row, const Sums& student, double log2_student, const Sums& rest) const {
        Buffers b;
        const auto z = [&](std::int64_t start, std::int64_t n) { return student_tile(i, start, n, b); };
        double* out = a_.observed + i * a_.observed_per_row;
        const bool last = rest.largest > student.largest || !(rest.at_tau < infinity);
        out[0] = first_of(last ? rest : student, a_.student.columns, z);
        out[1] = last ? first_of(student, taught_, z) : out[0];
        out[2] = student.entropy(log2_student, c_);
        if (!(student.at_tau < infinity)) out[0] = a_.no_top;
        out[3] = a_.no_top_of_teacher;
        out[4] = 0;
        if (distributions_ == 0) return;
        const bool several = distributions_ > 1;
        const auto t = [&](std::int64_t start, std::int64_t n) {
            return several ? ensemble_tile(i, start, n, row.teachers, b) : teacher_tile(0, i, start, n, b);
        };
        Sums teacher;
        const float scale = several ? 1 : c_;
        if (several) {  // their mixture is not known before; its logarithms are its logits
            for_tiles(0, taught_, [&](std::int64_t start, std::int64_t n) {
                add_tile<ThroughTile, Tau::one>(t(start, n), start, padded(n), scale, true, teacher, {nullptr, 0});
            });
        } else {
            for (const Sums& s : row.teacher_sums) teacher.merge(s, c_);
        }
        const double top = first_of(teacher, taught_, t);
        if (top >= 0) out[3] = top;
        out[4] = teacher.entropy(teacher.log2_at_tau(scale), scale);
    }

    // The first column of a row's largest logit, where that is finite.
    template <class Tile>
    static double first_of(const Sums& sums, std::int64_t end, Tile logits) {
        if (!(sums.at_tau < infinity) || sums.largest_at < 0) return DenseCall::no_top;
        constexpr std::int64_t part = 8 * width;
        for (std::int64_t start = sums.largest_at; start < end; start += part) {
            const std::int64_t n = std::min(part, end - start);
            const float* x = logits(start, n);
            for (std::int64_t j = 0; j < n; j += width)
                if (const unsigned found = bits(equal(load(x + j), set1(sums.largest))))
                    return static_cast<double>(start + j + std::countr_zero(found));
        }
        return DenseCall::no_top;
    }

    // The kept columns are read before their gradient can take their place.
    void begin_sparse(std::int64_t i, Row& row) const {
        if (!a_.sparse.ids) return;
        Buffers b;
        const SparseRow<D> sparse{divergence_, a_.sparse, taught_, 1 / inv_tau_, c_};
        sparse.outcomes(
            i, row.state, [&](std::int64_t column) { return *student_tile(i, column, 1, b); },
            [&] { return mass_beside(i, row, b); }, row.kept);
    }

    // The sum of p over the columns that were not kept.
    double mass_beside(std::int64_t i, const Row& row, Buffers& b) const {
        double total = 0;
        const V c = set1(c_), from = set1(-row.state.at_tau.hi), lo = set1(row.state.at_tau.lo);
        for_tiles(0, taught_, [&](std::int64_t start, std::int64_t n) {
            std::copy_n(student_tile(i, start, n, b), padded(n), b.mix);
            for (const std::int32_t id : row.kept.ids)
                if (in_tile(id, start, n)) b.mix[id - start] = -infinity;
            V sum = set1(0);
            for (std::int64_t j = 0; j < padded(n); j += width) sum = sum + exp2(affine(load(b.mix + j), c, from) - lo);
            total += hsum(sum);
        });
        return total;
    }

    // The exponential of the label's logit is part of the sum of all: where it is most of it, what the sum has beside
    // it says how little the label lacks, and is never below 0.
    float cross_entropy(std::int64_t i, double lse, const Row& row, const Sums& all, const Smoothing& smoothing) const {
        Buffers b;
        const std::int64_t label = a_.labels[i];
        const float z = *student_tile(i, label, 1, b);
        double ce = lse - z;
        if (ce < sum_beside_label) {
            const bool distilled = label < taught_;
            const SegmentSums& own = row.sums[static_cast<std::size_t>(label / segment)];
            Sums one = distilled ? own.student : own.rest;  // under the maximum at which it was added
            one.at_one =
                distilled ? with_tau([&]<Tau T>() { return at_one<T>(z, one, c_); }) : at_one<Tau::one>(z, one, log2e);
            one.rescale(all.max, c_);
            ce = std::log1p((all.at_one - one.at_one) / one.at_one);
        }
        if (a_.label_smoothing == 0) return static_cast<float>(ce);
        const double e = a_.label_smoothing, mean = lse - smoothing.sum / smoothing.present;
        return static_cast<float>((1 - e) * ce + e * mean);
    }

    // --- Pass 2

    RowConstants constants(std::int64_t i, const Row& row) const {
        RowConstants c;
        c.c = c_;
        c.streamed = streamed_;
        c.state = row.state;
        if (distributions_ == 1) {
            c.teacher = row.teachers[0];
            c.teacher_c = c_;
        }
        c.sided = sided_;
        const Normaliser &of_z = row.sides.student, &of_t = row.sides.teacher;
        c.offset = ((static_cast<double>(of_z.hi) - of_t.hi) + (static_cast<double>(of_z.lo) - of_t.lo)) / exact_c_;
        const auto log2_sum = [](Normaliser n) { return static_cast<double>(n.hi) + n.lo; };
        if (a_.c_soft) c.c_soft = a_.c_soft[i] * weight_ * inv_tau_;
        if (c.c_soft != 0) c.pull = c.c_soft * row.kept.pull;
        if (a_.c_hard && labelled(i)) c.c_one = a_.c_hard[i];
        if (a_.c_z && a_.c_z[i] != 0) {
            c.c_one += static_cast<float>(2 * a_.c_z[i] * log2_sum(row.state.at_one) * static_cast<double>(ln2));
        }
        // Without a factor softmax(z) is left out, not multiplied by 0: its normaliser may be another temperature's,
        // and what follows from that be infinite. Under an infinite normaliser it has no mass.
        if (c.c_one == 0) c.state.at_one = {infinity, 0};
        c.one_from_p = static_cast<float>(
            std::exp2((tau_ == Tau::two ? 2 : 1) * log2_sum(c.state.at_tau) - log2_sum(c.state.at_one)));
        return c;
    }

    template <Tau T, Want W>
    void visit_taught(std::int64_t i, const Row& row, const RowConstants& c, std::int64_t start, std::int64_t n,
                      Buffers& b, Value& sums) const {
        const float* t =
            distributions_ == 1 ? teacher_tile(0, i, start, n, b) : ensemble_tile(i, start, n, row.teachers, b);
        visit<ThroughTile, D, T, W>(divergence_, student_tile(i, start, n, b), t, padded(n), c,
                                    next_row(a_.student, i, start), next_row(a_.teachers[0], i, start), b.g, sums);
    }

    template <class Io, Tau T, Want W>
    void visit_direct(std::int64_t i, const RowConstants& c, std::int64_t start, std::int64_t n,
                      typename Io::Element* g, Value& sums) const {
        if constexpr (specialised<D>)
            visit<Io, D, T, W>(divergence_, columns<Io>(a_.student.row(i), start),
                               columns<Io>(a_.teachers[0].row(i), start), n, c, next_row(a_.student, i, start),
                               next_row(a_.teachers[0], i, start), g, sums);
    }

    void value_direct(std::int64_t i, const RowConstants& c, std::int64_t start, std::int64_t n, Value& sums) const {
        with_io([&]<class Io>() { visit_direct<Io, Tau::one, Want::value>(i, c, start, n, nullptr, sums); });
    }

    template <class Io, Tau T>
    void visit_alone(std::int64_t i, const RowConstants& c, std::int64_t start, std::int64_t n,
                     typename Io::Element* g) const {
        visit_student<Io, T>(columns<Io>(a_.student.row(i), start), n, c, c.pull, next_row(a_.student, i, start), g);
    }

    // Has a tile of the gradient written where it belongs or, where no vectors can be streamed to that address, aside
    // and copied.
    template <class Io, class Visit>
    void write_direct(std::int64_t i, RowConstants c, std::int64_t start, std::int64_t n, Buffers& b,
                      Visit visit_with) const {
        auto* out = columns<Io>(a_.grad.row(i), start);
        if (!streamed_ || reinterpret_cast<std::uintptr_t>(out) % (width * sizeof(float)) == 0)
            return visit_with(c, out);
        c.streamed = false;
        auto* aside = reinterpret_cast<typename Io::Element*>(b.g);
        visit_with(c, aside);
        stream_out(out, aside, n);
    }

    void value_segment(std::int64_t i, Row& row, std::int64_t s) const {
        Buffers b;
        const RowConstants c = constants(i, row);
        Value sums;
        for_segment(
            s,
            [&](std::int64_t start, std::int64_t n) {
                if (wants_dtau_) return visit_taught<Tau::one, Want::value_and_dtau>(i, row, c, start, n, b, sums);
                if (direct_)
                    return with_io(
                        [&]<class Io>() { visit_direct<Io, Tau::one, Want::value>(i, c, start, n, nullptr, sums); });
                visit_taught<Tau::one, Want::value>(i, row, c, start, n, b, sums);
            },
            [](std::int64_t, std::int64_t) {});
        row.values[s] = sums;
    }

    void finish_value(Row& row) const {
        if (sum_student_known_) return;
        Value total;
        for (const Value& v : row.values) total += v;
        row.state.sum_student = static_cast<float>(total.student);
    }

    // --- Pass 3

    void gradient_segment(std::int64_t i, Row& row, std::int64_t s) const {
        if (!specialised<D> && !a_.teachers.empty()) return gradient_segment<Tau::other>(i, row, s);
        with_tau([&]<Tau T>() { gradient_segment<T>(i, row, s); });
    }

    // The few columns around a label, whose gradient has one more summand: kept aside, as the gradient may take their
    // place, and written anew once their tile is done.
    void keep(std::int64_t i, std::int64_t start, std::int64_t n, Buffers& b) const {
        const auto copy = [&](const Rows& rows, float* to) {
            const float* from = load_tile(rows.row(i), rows.dtype, start, n, to);
            if (from != to) std::copy_n(from, n, to);
        };
        copy(a_.student, b.z);
        if (!a_.teachers.empty()) copy(a_.teachers[0], b.t);
    }

    template <Tau T>
    void mend(std::int64_t i, const RowConstants& c, std::int64_t start, std::int64_t n, std::int64_t label,
              Buffers& b) const {
        const Ahead nothing = {nullptr, 0};
        Value unused;
        if (a_.teachers.empty()) {
            visit_student<ThroughTile, T>(b.z, n, c, c.pull, nothing, b.g);
        } else {
            visit<ThroughTile, D, T, Want::gradient>(divergence_, b.z, b.t, n, c, nothing, nothing, b.g, unused);
        }
        b.g[label - start] -= a_.c_hard[i];
        store_tile(a_.grad.dtype, a_.grad.row(i), start, b.g, n, b.mix, false);
    }

    template <Tau T>
    void gradient_segment(std::int64_t i, Row& row, std::int64_t s) const {
        Buffers b;
        const RowConstants c = constants(i, row);
        // Without weight on the distillation term its gradient is left out, not multiplied by 0: it may be infinite.
        const bool soft = c.c_soft != 0;
        const float smoothed = a_.c_hard && labelled(i) ? a_.c_hard[i] * a_.label_smoothing : 0;
        Value sums;
        const auto finish_tile = [&](std::int64_t start, std::int64_t n) {
            if (smoothed != 0)
                add_where_present(student_tile(i, start, n, b), padded(n), -smoothed / row.state.present, b.g);
            if (a_.c_hard && labelled(i)) {
                if (in_tile(a_.labels[i], start, n)) b.g[a_.labels[i] - start] -= a_.c_hard[i] - smoothed;
            }
            if (!plain(a_.student_cap)) apply_derivative(a_.student_cap, b.z, padded(n), b.g);
            store_tile(a_.grad.dtype, a_.grad.row(i), start, b.g, n, b.z, streamed_);
        };
        for_segment(
            s,
            [&](std::int64_t start, std::int64_t n) {
                constexpr Want joint = D::sum_student_known ? Want::value_and_gradient : Want::gradient;
                const bool with_value = joint_ && from_logits_ && !row.value_known;
                const bool alone = a_.teachers.empty();
                if (direct_ && (soft || alone) && smoothed == 0) {
                    const std::int64_t label = a_.c_hard && labelled(i) ? a_.labels[i] : -1;
                    const std::int64_t at = start + (label - start) / step * step, m = std::min(step, start + n - at);
                    if (in_tile(label, start, n)) keep(i, at, m, b);
                    with_io([&]<class Io>() {
                        write_direct<Io>(i, c, start, n, b, [&](const RowConstants& how, typename Io::Element* g) {
                            if (alone) return visit_alone<Io, T>(i, how, start, n, g);
                            with_value ? visit_direct<Io, T, joint>(i, how, start, n, g, sums)
                                       : visit_direct<Io, T, Want::gradient>(i, how, start, n, g, sums);
                        });
                    });
                    if (in_tile(label, start, n)) mend<T>(i, c, at, m, label, b);
                    return;
                }
                if (alone) {
                    visit_student<ThroughTile, T>(student_tile(i, start, n, b), padded(n), c, c.pull,
                                                  next_row(a_.student, i, start), b.g);
                    return finish_tile(start, n);
                }
                if (with_value && direct_) value_direct(i, c, start, n, sums);  // summed in the order of pass 2
                if (with_value && !direct_) {
                    visit_taught<T, joint>(i, row, c, start, n, b, sums);
                } else if (soft) {
                    visit_taught<T, Want::gradient>(i, row, c, start, n, b, sums);
                }
                if (!soft) visit_hard(student_tile(i, start, n, b), padded(n), c, b.g);
                finish_tile(start, n);
            },
            [&](std::int64_t start, std::int64_t n) {
                visit_hard(student_tile(i, start, n, b), padded(n), c, b.g);
                finish_tile(start, n);
            });
        if (joint_) row.values[s] = sums;
    }

    // The gradient of the kept columns, in place of what they have as one of many.
    void mend_kept(std::int64_t i, const Row& row) const {
        if (!a_.sparse.ids || !wants_gradient_) return;
        Buffers b;
        const RowConstants c = constants(i, row);
        const Kept& kept = row.kept;
        std::vector<float> g(kept.z.size());
        visit_hard(kept.z.data(), static_cast<std::int64_t>(g.size()), c, g.data());
        const bool hard = a_.c_hard && labelled(i);
        const float smoothed = hard ? a_.c_hard[i] * a_.label_smoothing : 0;
        for (std::size_t k = 0; k < g.size(); ++k) {
            if (kept.ids[k] < 0) continue;
            if (c.c_soft != 0) g[k] += c.c_soft * kept.gradient[k];
            if (smoothed != 0 && kept.z[k] > -infinity) g[k] -= smoothed / row.state.present;
            if (hard && kept.ids[k] == a_.labels[i]) g[k] -= a_.c_hard[i] - smoothed;
        }
        if (!plain(a_.student_cap))
            apply_derivative(a_.student_cap, kept.z.data(), static_cast<std::int64_t>(g.size()), g.data());
        for (std::size_t k = 0; k < g.size(); ++k) {
            if (kept.ids[k] < 0) continue;
            b.g[0] = g[k];  // whole vectors are read from there
            store_tile(a_.grad.dtype, a_.grad.row(i), kept.ids[k], b.g, 1, b.z, false);
        }
    }

    void finish_row(std::int64_t i, const Row& row) const {
        mend_kept(i, row);
        if (a_.stats && from_logits_) {
            float* saved = a_.stats + i * a_.stats_per_row();
            std::memcpy(saved, &row.state, sizeof(RowState));
            if (distributions_ > 0)
                std::memcpy(saved + DenseCall::state_size, row.teachers.data(),
                            row.teachers.size() * sizeof(Normaliser));
            if (sided_) std::memcpy(saved + sides_at, &row.sides, sizeof(row.sides));
        }
        if (!a_.taught()) return;
        Value total;
        for (const Value& v : row.values) total += v;
        if (row.value_known) total.value = row.value;
        if (a_.sparse.ids) total.value = row.kept.value;
        if (a_.values) {
            const double sums[] = {total.value * weight_,
                                   total.student * weight_,
                                   total.student_u * weight_,
                                   total.p_u,
                                   total.teacher * weight_,
                                   total.teacher_v * weight_,
                                   total.q_v};
            std::transform(std::begin(sums), std::end(sums), a_.values + i * a_.values_per_row,
                           [](double x) { return static_cast<float>(x); });
        }
        if (a_.soft) a_.soft[i] = static_cast<float>(total.value * weight_);
        if (a_.dsoft_dtemperature) {  // -(1 / tau) (dD/dx . x + dD/dy . y), x and y the logits over tau, up to a shift:
                                      // u and v
            const double student = total.student_u - total.student * total.p_u;
            const double teacher = total.teacher_v - total.teacher * total.q_v;
            a_.dsoft_dtemperature[i] =
                static_cast<float>(-weight_ * inv_tau_ * static_cast<double>(ln2) * (student + teacher));
        }
    }

    const D divergence_;
    const float weight_;
    // In the saved state, behind the one distribution.
    static constexpr std::int64_t sides_at = DenseCall::state_size + 2;
    std::int64_t segments_;
    const bool sided_;
    Tau tau_;
    bool sum_student_known_;
    bool from_logits_ = true;
    bool wants_gradient_ = false;
    bool wants_dtau_ = false;
    bool joint_ = false;       // value and gradient in one pass
    bool value_pass_ = false;  // the value in a pass of its own
};

static_assert(sizeof(RowState) == DenseCall::state_size * sizeof(float));

void run(const DenseCall& call, Passes passes) {
    check(call);
    if (call.rows == 0) return;
    const auto go = [&](auto divergence, float weight) { Call(call, divergence, weight).run(passes); };
    if (call.terms.size() > 1) return go(Mixture(call.terms), 1);
    if (call.terms.empty()) return go(ForwardKl(0), 1);  // no teacher: nothing asks it
    Mixture::with(call.terms[0], [&](auto divergence) {
        go(divergence, call.terms[0].weight);
        return set1(0);
    });
}

void forward(const DenseCall& call) { run(call, Passes::all); }
void backward(const DenseCall& call) { run(call, Passes::gradient); }
void sums(const DenseCall& call) { run(call, Passes::sums); }
void values(const DenseCall& call) { run(call, Passes::values); }

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA

#define KDFAST_CONCAT(a, b) a##b
#define KDFAST_KERNELS(isa) KDFAST_CONCAT(isa, _kernels)
#define KDFAST_SELECT(isa) KDFAST_CONCAT(isa, _select)
#define KDFAST_QUOTE(x) #x
#define KDFAST_NAME(isa) KDFAST_QUOTE(isa)

namespace kdfast::cpu {
const Kernels KDFAST_KERNELS(KDFAST_ISA) = {
    KDFAST_NAME(KDFAST_ISA), KDFAST_ISA::forward,        KDFAST_ISA::backward,
    KDFAST_ISA::sums,        KDFAST_ISA::values,         KDFAST_ISA::triad,
    KDFAST_ISA::scale,       &KDFAST_SELECT(KDFAST_ISA), &cache::KDFAST_KERNELS(KDFAST_ISA),
};
}  // namespace kdfast::cpu
