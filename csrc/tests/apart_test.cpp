// Logits whose columns lie apart in memory give the bits of the same in contiguous rows.
#include "cpu/apart.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "dense_case.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

constexpr std::byte canary{0xa5};

// Rows as images of `pixels` rows have them, a gap behind each column of each image.
class Images {
  public:
    Images(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t pixels, std::int64_t gap)
        : rows_(rows),
          memory_(static_cast<std::size_t>(rows / pixels * columns * (pixels + gap)) * size_of(dtype), canary) {
        view.data = memory_.data();
        view.dtype = dtype;
        view.columns = columns;
        view.shape = {rows / pixels, pixels};
        view.strides = {columns * (pixels + gap), 1};
        view.column_stride = pixels + gap;
    }
    Images(const Matrix& from, const Rows& like, std::int64_t rows, std::int64_t pixels, std::int64_t gap)
        : Images(like.dtype, rows, like.columns, pixels, gap) {
        const std::vector<std::uint32_t> bits = from.all_bits();
        for (std::size_t n = 0; n < bits.size(); ++n) std::memcpy(at(n), &bits[n], size_of(like.dtype));
    }

    std::vector<std::uint32_t> all_bits() {
        std::vector<std::uint32_t> bits(static_cast<std::size_t>(rows_ * view.columns));
        for (std::size_t n = 0; n < bits.size(); ++n) std::memcpy(&bits[n], at(n), size_of(view.dtype));
        return bits;
    }
    // Clears what the rows hold; what is left must be canaries.
    bool gaps_hold() {
        for (std::size_t n = 0; n < static_cast<std::size_t>(rows_ * view.columns); ++n)
            std::memset(at(n), static_cast<int>(canary), size_of(view.dtype));
        return std::ranges::all_of(memory_, [](std::byte b) { return b == canary; });
    }

    Rows view;

  private:
    std::byte* at(std::size_t n) {
        const auto i = static_cast<std::int64_t>(n) / view.columns,
                   column = static_cast<std::int64_t>(n) % view.columns;
        return view.row(i) + column * view.column_stride * static_cast<std::int64_t>(size_of(view.dtype));
    }

    std::int64_t rows_;
    std::vector<std::byte> memory_;
};

// Forward with the gradient, and the gradient from statistics, in the layouts that `student_apart` and `teacher_apart`
// tell.
void check(const cpu::Kernels& kernels, const Case& c, std::int64_t pixels, std::int64_t gap, bool student_apart,
           bool teacher_apart) {
    const Scope scope(text(c.rows, " rows of ", c.columns, ", ", pixels, " an image, gap ", gap, ", ", c.threads,
                           " threads, student ", student_apart, ", teacher ", teacher_apart));
    const Outputs want = c.run(kernels);
    cpu::DenseCall call = c.call();
    Images student(c.student, call.student, c.rows, pixels, gap), grad(c.grad_dtype, c.rows, c.columns, pixels, gap);
    std::vector<Images> teachers;
    for (std::size_t k = 0; k < call.teachers.size(); ++k)
        teachers.emplace_back(c.teachers[k], call.teachers[k], c.rows, pixels, gap);
    if (student_apart) call.student = student.view;
    for (std::size_t k = 0; k < teachers.size(); ++k)
        if (teacher_apart) call.teachers[k] = teachers[k].view;
    call.grad = grad.view;
    Outputs out = want;
    for (std::vector<float>* v : {&out.soft, &out.hard, &out.z2, &out.stats}) std::ranges::fill(*v, nan32);
    std::ranges::fill(out.observed, not_a_number);
    if (call.taught()) call.soft = out.soft.data();
    if (call.labels) call.hard = out.hard.data();
    call.z2 = out.z2.data();
    call.stats = out.stats.data();
    if (c.observes) call.observed = out.observed.data();
    cpu::run_apart(call, kernels.forward);
    out.grad = grad.all_bits();
    CHECK(out.same(want));
    CHECK(grad.gaps_hold());
    call.soft = call.hard = call.z2 = nullptr;
    call.observed = nullptr;
    cpu::run_apart(call, kernels.backward);
    CHECK(grad.all_bits() == c.run_twice(kernels).grad);
}

}  // namespace

TEST(columns_apart_give_the_bits_of_contiguous_rows) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        for (std::int64_t columns : {2, 19, 150, 1030})
            for (std::int64_t pixels : {1, 6, 49, 64, 300})
                for (DType dtype : dtypes) {
                    const std::int64_t images = integer(random, 1, 3);
                    Case c(random, images * pixels, columns, dtype, static_cast<std::size_t>(integer(random, 0, 2)));
                    c.terms = {every_term[static_cast<std::size_t>(integer(random, 0, 7))]};
                    c.temperature = 1.5f;
                    c.smoothing = columns == 19 ? 0.1f : 0.0f;
                    c.observes = columns == 150;
                    c.threads = static_cast<int>(integer(random, 1, 3));
                    c.counted = std::make_unique<bool[]>(static_cast<std::size_t>(c.rows));
                    for (std::int64_t i = 0; i < c.rows; ++i) c.counted[i] = i % 5 != 3;
                    check(kernels, c, pixels, pixels == 64 ? 0 : 3, true, true);
                    if (columns == 19) check(kernels, c, pixels, 0, true, false);
                    if (columns == 19) check(kernels, c, pixels, 16, false, true);
                }
    });
}

TEST(long_rows_apart_take_memory_of_their_own) {
    Case c(random, 34, 20000, DType::f32);
    c.threads = 2;
    check(cpu::kernels(), c, 17, 0, true, true);
}

TEST(teacher_weights_of_rows_apart_are_theirs) {
    Case c(random, 98, 30, DType::bf16, 3);
    c.weights_per_row = true;
    c.weights.assign(static_cast<std::size_t>(3 * c.rows), 0.0f);
    for (float& w : c.weights) w = static_cast<float>(uniform(random, 0.2, 1));
    check(cpu::kernels(), c, 49, 0, true, true);
}

TEST(a_wrong_label_apart_writes_nothing) {
    Case c(random, 128, 40, DType::f32);
    c.labels[100] = 40;
    cpu::DenseCall call = c.call();
    Images student(c.student, call.student, c.rows, 64, 0), grad(DType::f32, c.rows, c.columns, 64, 0);
    call.student = student.view;
    call.grad = grad.view;
    CHECK_THROWS(ArgumentError, cpu::run_apart(call, cpu::kernels().forward));
    for (const std::uint32_t bits : grad.all_bits()) CHECK_EQUAL(bits, 0xa5a5a5a5u);
}
