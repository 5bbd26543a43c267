#include "cpu/apart.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "core/threads.h"
#include "cpu/transpose.h"

namespace kdfast::cpu {
namespace {

constexpr std::int64_t line = 64;  // bytes
// Of a group's logits: about half of a second-level cache, and of each column as many lines in a row as that allows.
constexpr std::int64_t group_bytes = 512 << 10;

struct alignas(line) Line {
    std::byte bytes[line];
};

// Memory for a group, which a thread keeps from call to call: fresh pages took as long as filling them. A group that
// is larger, of a few long rows, has its own.
class Scratch {
  public:
    explicit Scratch(std::int64_t lines) {
        static thread_local std::unique_ptr<Line[]> kept;
        const bool fits = lines * line <= group_bytes;
        std::unique_ptr<Line[]>& memory = fits ? kept : own_;
        if (!memory) memory = std::make_unique_for_overwrite<Line[]>(fits ? group_bytes / line : lines);
        next_ = memory.get();
    }

    // Of a row: an odd number, so that rows do not meet in one set of the cache.
    static std::int64_t lines_of_row(const Rows& like) {
        return (like.columns * static_cast<std::int64_t>(size_of(like.dtype)) + line - 1) / line | 1;
    }

    // Contiguous rows for as many of another tensor.
    Rows rows(const Rows& like, std::int64_t count) {
        const std::int64_t lines = lines_of_row(like);
        Rows r;
        r.data = next_->bytes;
        r.dtype = like.dtype;
        r.columns = like.columns;
        r.shape = {count};
        r.strides = {lines * line / static_cast<std::int64_t>(size_of(like.dtype))};
        next_ += count * lines;
        return r;
    }

  private:
    std::unique_ptr<Line[]> own_;
    Line* next_;
};

// Calls move(i, n) for stretches of rows [first + i, first + i + n) that lie side by side.
template <class Move>
void for_stretches(const Rows& rows, std::int64_t first, std::int64_t count, Move move) {
    const std::int64_t inner = rows.column_stride == 1 || rows.shape.empty() ? 1 : rows.shape.back();
    for (std::int64_t i = 0, n; i < count; i += n) {
        n = std::min(count - i, inner - (first + i) % inner);
        move(i, n);
    }
}

void gather(const Rows& from, std::int64_t first, std::int64_t count, const Rows& to) {
    const std::size_t size = size_of(from.dtype);
    for_stretches(from, first, count, [&](std::int64_t i, std::int64_t n) {
        if (from.column_stride == 1) {
            std::memcpy(to.row(i), from.row(first + i), static_cast<std::size_t>(from.columns) * size);
        } else {
            transpose(Far::from, from.row(first + i), from.column_stride, to.row(i), to.strides[0], from.columns, n,
                      size);
        }
    });
}

void scatter(const Rows& from, const Rows& to, std::int64_t first, std::int64_t count) {
    const std::size_t size = size_of(to.dtype);
    for_stretches(to, first, count, [&](std::int64_t i, std::int64_t n) {
        if (to.column_stride == 1) {
            std::memcpy(to.row(first + i), from.row(i), static_cast<std::size_t>(to.columns) * size);
        } else {
            transpose(Far::to, from.row(i), from.strides[0], to.row(first + i), to.column_stride, n, to.columns, size);
        }
    });
}

bool apart(const DenseCall& call) {
    const auto strided = [](const Rows& rows) { return rows.column_stride != 1; };
    return strided(call.student) || strided(call.grad) || std::ranges::any_of(call.teachers, strided);
}

}  // namespace

void run_apart(const DenseCall& call, DenseForward kernel) {
    if (!apart(call)) return kernel(call);
    check(call);  // all of it, before a part writes anything
    if (call.rows == 0) return;
    const std::int64_t lines =
        std::accumulate(call.teachers.begin(), call.teachers.end(), Scratch::lines_of_row(call.student),
                        [](std::int64_t sum, const Rows& t) { return sum + Scratch::lines_of_row(t); });

    // Whole lines of each column, some groups a thread; either several images a group, or several groups an image.
    const std::int64_t image = call.student.shape.empty() ? 1 : call.student.shape.back();
    const std::int64_t whole = line / static_cast<std::int64_t>(size_of(call.student.dtype));
    const std::int64_t most = std::min(group_bytes / (lines * line), call.rows / (4 * call.threads));
    std::int64_t group = std::max<std::int64_t>(most / whole, 1) * whole;
    if (group >= image) group = group / image * image;
    const std::int64_t unit = std::max(group, image), parts = (unit + group - 1) / group;
    const std::int64_t tasks = (call.rows + unit - 1) / unit * parts;

    std::atomic<std::int64_t> next{0};
    parallel_for(call.threads, call.threads, [&](std::int64_t) {
        Scratch scratch(lines * group);
        const Rows student = scratch.rows(call.student, group);
        std::vector<Rows> teachers;
        for (const Rows& t : call.teachers) teachers.push_back(scratch.rows(t, group));
        for (std::int64_t task; (task = next++) < tasks;) {
            const std::int64_t begin = task / parts * unit, first = begin + task % parts * group;
            const std::int64_t count = std::min({group, begin + unit - first, call.rows - first});
            if (count <= 0) continue;
            gather(call.student, first, count, student);
            for (std::size_t k = 0; k < teachers.size(); ++k) gather(call.teachers[k], first, count, teachers[k]);
            DenseCall part = call.part(first, count);
            part.student = student;
            part.teachers = teachers;
            part.threads = 1;
            if (call.grad.data) {
                part.grad = student;
                part.grad_is_read = true;
            }
            kernel(part);
            if (call.grad.data) scatter(student, call.grad, first, count);
        }
        fence_streams();
    });
}

}  // namespace kdfast::cpu
