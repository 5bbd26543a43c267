// Selection of sparse targets: the part that is compiled for every CPU alike.
//
// A row is read from memory once, tile by tile: maxima and sums of exponentials at every temperature, relative to a
// reference of the tile's own, so that no tile depends on another. What follows touches a small part of a row that is
// in cache still.
//
// The k largest columns. Maxima of disjoint sets of columns are columns, so where k of such maxima are above a floor,
// so are k columns, and with several times k sets few more. Only blocks with a maximum above it are looked at again.
//
// Log-normalisers. Where one column has more than half of the mass, the sum of the others would be the difference of
// two numbers near each other, so that its tile is summed anew without it: log sum = log largest + log1p(others /
// largest).
//
// Draws. A tile's sums come by block too; they lead to the block that a point of the distribution function lies in, and
// only there are the weights of single columns looked at, and added up in fp64.
#include "cpu/select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>
#include <string>

#include "core/error.h"
#include "core/threads.h"
#include "cpu/philox.h"

namespace kdfast::cpu {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr float nan32 = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t segment = 4;  // tiles that are a task where rows are few

float half(std::uint32_t h) {
    const std::uint32_t magnitude = (h & 0x7fffu) << 13;
    const float f = (h & 0x7c00u) == 0x7c00u ? std::bit_cast<float>(magnitude | 0x7f800000u)
                                             : std::bit_cast<float>(magnitude) * 0x1p112f;
    return (h & 0x8000u) ? -f : f;
}

float element(const std::byte* row, DType dtype, std::int64_t i) {
    if (dtype == DType::f32) {
        float x;
        std::memcpy(&x, row + 4 * i, 4);
        return x;
    }
    std::uint16_t h;
    std::memcpy(&h, row + 2 * i, 2);
    return dtype == DType::bf16 ? std::bit_cast<float>(std::uint32_t{h} << 16) : half(h);
}

void take_out(std::byte* row, DType dtype, std::int64_t i) {
    const std::uint32_t wide = 0xff800000u;
    const std::uint16_t narrow = dtype == DType::bf16 ? 0xff80 : 0xfc00;
    dtype == DType::f32 ? std::memcpy(row + 4 * i, &wide, 4) : std::memcpy(row + 2 * i, &narrow, 2);
}

std::int64_t id_of(Key key) { return static_cast<std::int64_t>(key & 0xffffffffu); }
float value_of(Key key) {
    const std::uint32_t ascending = ~static_cast<std::uint32_t>(key >> 32);
    return std::bit_cast<float>(ascending & 0x80000000u ? ascending & 0x7fffffffu : ~ascending);
}

struct Entry {  // of a sampled method
    std::int64_t id;
    double mass;
};

// What the scan of a tile leaves of it.
struct Sums {
    float max, reference;
    const float* sums;  // (temperatures) relative to the reference
};

// One thread's scratch: what the scan of a row leaves behind, and what is made of it.
struct Scratch {
    std::vector<float> maxima;      // (blocks, lanes)
    std::vector<float> max;         // (tiles)
    std::vector<float> reference;   // (tiles)
    std::vector<float> sums;        // (tiles, temperatures)
    std::vector<float> block_sums;  // (blocks)
    std::vector<float> bins;
    std::vector<Key> keys;
    std::vector<std::byte> tile;   // one without its maximum
    std::vector<float> tile_sums;  // (temperatures) of that
    std::vector<double> totals;    // (temperatures) sums of exponentials, relative to the row's maximum
    std::vector<double> others;    // (temperatures) the same of all columns but one that has the maximum
    std::vector<double> weights;   // (blocks) sums at the temperature that is drawn at
    std::vector<double> points;    // of the distribution function, ascending
    std::vector<Entry> entries;
    std::vector<float> raw;       // weights of one block's columns, relative to their tile's maximum
    std::vector<double> columns;  // and to the row's
};

class Selection {
  public:
    Selection(const SelectCall& call, const SelectKernels& kernels) : a_(call), kernels_(kernels) {
        columns_ = a_.logits.columns;
        tile_ = select_tile(a_.logits.dtype);
        tiles_ = (columns_ + tile_ - 1) / tile_;
        block_ = kernels_.block();
        blocks_ = (columns_ + block_ - 1) / block_;
        temperatures_ = a_.temperatures;
        if (std::find(temperatures_.begin(), temperatures_.end(), 1.0) == temperatures_.end())
            temperatures_.push_back(1.0);
        one_ = std::find(temperatures_.begin(), temperatures_.end(), 1.0) - temperatures_.begin();
        plan_exponentials();
    }

    void run() {
        if (a_.rows >= a_.threads || tiles_ <= segment) {
            // Several rows a task where rows are short: they are less work than fetching a task.
            const std::int64_t fair = std::max<std::int64_t>(1, a_.rows / (8 * a_.threads));
            const std::int64_t group = std::clamp<std::int64_t>((1 << 19) / columns_, 1, fair);
            parallel_for((a_.rows + group - 1) / group, a_.threads, [&](std::int64_t task) {
                Scratch s = scratch();
                for (std::int64_t i = task * group; i < std::min(a_.rows, (task + 1) * group); ++i) {
                    scan(i, 0, tiles_, s);
                    finish(i, s);
                }
            });
            return;
        }
        std::vector<Scratch> rows(static_cast<std::size_t>(a_.rows), scratch());
        const std::int64_t segments = (tiles_ + segment - 1) / segment;
        parallel_for(a_.rows * segments, a_.threads, [&](std::int64_t task) {
            const std::int64_t i = task / segments, begin = task % segments * segment;
            scan(i, begin, std::min(tiles_, begin + segment), rows[i]);
        });
        parallel_for(a_.rows, a_.threads, [&](std::int64_t i) { finish(i, rows[i]); });
    }

  private:
    // One exponential serves a temperature and its half. The first is the one that is drawn at, if any is.
    void plan_exponentials() {
        std::vector<bool> planned(temperatures_.size());
        std::vector<std::size_t> order(temperatures_.size());
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
        std::sort(order.begin() + (a_.sampled() ? 1 : 0), order.end(),
                  [&](std::size_t a, std::size_t b) { return temperatures_[a] > temperatures_[b]; });
        for (const std::size_t i : order) {
            if (planned[i]) continue;
            const auto found = std::find(temperatures_.begin(), temperatures_.end(), temperatures_[i] / 2);
            const auto squared = found - temperatures_.begin();
            const bool free = found != temperatures_.end() && !planned[static_cast<std::size_t>(squared)];
            exponentials_.push_back({static_cast<float>(std::numbers::log2e / temperatures_[i]),
                                     static_cast<std::int64_t>(i), free ? static_cast<std::int64_t>(squared) : -1});
            planned[i] = true;
            if (free) planned[static_cast<std::size_t>(squared)] = true;
        }
    }

    Scratch scratch() const {
        const auto blocks = static_cast<std::size_t>(blocks_), lanes = static_cast<std::size_t>(kernels_.lanes);
        Scratch s;
        s.maxima.resize(blocks * lanes);
        s.bins.resize(blocks * lanes);
        s.keys.resize(static_cast<std::size_t>(std::min(2 * a_.k, columns_) + 1024 + block_));
        s.max.resize(static_cast<std::size_t>(tiles_));
        s.reference.resize(static_cast<std::size_t>(tiles_));
        s.sums.resize(static_cast<std::size_t>(tiles_) * temperatures_.size());
        s.tile.resize(static_cast<std::size_t>(tile_) * size_of(a_.logits.dtype));
        s.tile_sums.resize(temperatures_.size());
        if (a_.sampled()) {
            s.block_sums.resize(blocks);
            s.weights.resize(blocks);
            s.raw.resize(static_cast<std::size_t>(block_));
            s.columns.resize(static_cast<std::size_t>(block_));
        }
        return s;
    }

    const std::byte* at(std::int64_t i, std::int64_t column) const {
        return a_.logits.row(i) + column * static_cast<std::int64_t>(size_of(a_.logits.dtype));
    }

    // Where the tile after t is, or where the next row begins; null where there is no whole tile.
    const std::byte* after(std::int64_t i, std::int64_t t) const {
        const std::int64_t next = (t + 1) * tile_;
        if (next + tile_ <= columns_) return at(i, next);
        return t + 1 == tiles_ && i + 1 < a_.rows && tiles_ > 1 ? at(i + 1, 0) : nullptr;
    }

    void scan(std::int64_t i, std::int64_t begin, std::int64_t end, Scratch& s) const {
        for (std::int64_t t = begin; t < end; ++t) {
            const std::int64_t first = t * tile_, block = first / block_;
            kernels_.scan({.data = at(i, first),
                           .dtype = a_.logits.dtype,
                           .columns = std::min(tile_, columns_ - first),
                           .ahead = after(i, t),
                           .exponentials = exponentials_.data(),
                           .exponentials_count = static_cast<std::int64_t>(exponentials_.size()),
                           .maxima = s.maxima.data() + block * kernels_.lanes,
                           .max = &s.max[t],
                           .reference = &s.reference[t],
                           .sums = &s.sums[t * static_cast<std::int64_t>(temperatures_.size())],
                           .block_sums = s.block_sums.empty() ? nullptr : &s.block_sums[block]});
        }
    }

    // What a tile's sums are to be multiplied by, to be relative to the row's maximum, with the rounding of the tile's
    // reference taken out.
    double factor(const Sums& tile, float top, const Exponential& e) const {
        if (tile.max == -std::numeric_limits<float>::infinity()) return 0;
        const float product = tile.reference * e.c;
        const double rounding = static_cast<double>(tile.reference) * e.c - product;
        return std::exp((static_cast<double>(tile.reference) - top) / temperatures_[e.at] -
                        rounding * std::numbers::ln2);
    }

    Sums sums_of(const Scratch& s, std::int64_t tile) const {
        return {s.max[tile], s.reference[tile], &s.sums[tile * static_cast<std::int64_t>(temperatures_.size())]};
    }

    void add_tile(const Sums& tile, float top, std::vector<double>& totals) const {
        for (const Exponential& e : exponentials_) {
            const double f = factor(tile, top, e);
            totals[e.at] += f * tile.sums[e.at];
            if (e.squared_at >= 0) totals[e.squared_at] += f * f * tile.sums[e.squared_at];
        }
    }

    // The sums of the columns beside one that has the row's maximum, which is finite.
    void sum_others(std::int64_t i, float top, Scratch& s) const {
        const std::int64_t tile = std::find(s.max.begin(), s.max.end(), top) - s.max.begin();
        s.others.assign(temperatures_.size(), 0);
        for (std::int64_t t = 0; t < tiles_; ++t)
            if (t != tile) add_tile(sums_of(s, t), top, s.others);
        s.totals = s.others;
        add_tile(sums_of(s, tile), top, s.totals);
        if (*std::min_element(s.totals.begin(), s.totals.end()) < 2)
            add_tile(sums_beside(i, tile, top, s), top, s.others);
        else
            std::transform(s.totals.begin(), s.totals.end(), s.others.begin(), [](double sum) { return sum - 1; });
    }

    // Sums of a tile without one column that has its maximum.
    Sums sums_beside(std::int64_t i, std::int64_t t, float top, Scratch& s) const {
        const std::int64_t first = t * tile_, columns = std::min(tile_, columns_ - first);
        const auto size = static_cast<std::int64_t>(size_of(a_.logits.dtype));
        std::copy_n(at(i, first), columns * size, s.tile.begin());
        // The block that it is in, then the column, which if denormal is 0 to a scan.
        const float* maxima = &s.maxima[first / block_ * kernels_.lanes];
        std::int64_t column =
            (std::find(maxima, maxima + tile_ / block_ * kernels_.lanes, top) - maxima) / kernels_.lanes * block_;
        const auto is_top = [&](float x) { return std::abs(x - top) < std::numeric_limits<float>::min(); };
        while (column + 1 < columns && !is_top(element(s.tile.data(), a_.logits.dtype, column))) ++column;
        take_out(s.tile.data(), a_.logits.dtype, column);
        Sums out;
        kernels_.scan({.data = s.tile.data(),
                       .dtype = a_.logits.dtype,
                       .columns = columns,
                       .ahead = nullptr,
                       .exponentials = exponentials_.data(),
                       .exponentials_count = static_cast<std::int64_t>(exponentials_.size()),
                       .maxima = s.bins.data(),
                       .max = &out.max,
                       .reference = &out.reference,
                       .sums = s.tile_sums.data(),
                       .block_sums = nullptr});
        out.sums = s.tile_sums.data();
        return out;
    }

    void finish(std::int64_t i, Scratch& s) const {
        const float top = *std::max_element(s.max.begin(), s.max.end());
        s.entries.clear();
        if (!std::isfinite(top)) return fill_nan(i);
        sum_others(i, top, s);
        const double log_one = std::log1p(s.others[one_]);
        if (!std::isfinite(log_one)) return fill_nan(i);
        for (std::size_t t = 0; t < a_.temperatures.size(); ++t) {
            const double lse = std::log1p(s.others[t]) - log_one / temperatures_[t];
            a_.lse[static_cast<std::int64_t>(t) * a_.rows + i] = static_cast<float>(lse);
        }
        if (!a_.sampled()) return keep(i, top, log_one, s);
        weigh_blocks(top, s);
        a_.method == Method::sample ? sample(i, top, s) : pps(i, top, s);
        write_entries(i, top, log_one, s);
    }

    void fill_nan(std::int64_t i) const {
        for (std::size_t t = 0; t < a_.temperatures.size(); ++t)
            a_.lse[static_cast<std::int64_t>(t) * a_.rows + i] = nan32;
        const std::int64_t there = std::min(a_.k, columns_);
        a_.k_eff[i] = static_cast<std::int32_t>(there);
        for (std::int64_t j = 0; j < a_.k; ++j) a_.ids[i * a_.k + j] = j < there ? static_cast<std::int32_t>(j) : -1;
        std::fill_n(a_.logprobs + i * a_.k, a_.k, nan32);
        if (!a_.sampled()) return;
        std::fill_n(a_.mass + i * a_.k, a_.k, nan32);
        a_.neg_entropy[i] = nan32;
    }

    // --- The largest columns

    // The first k columns above -inf, in order.
    std::span<const Key> largest(std::int64_t i, Scratch& s) const {
        Collection c{.row = a_.logits.row(i),
                     .dtype = a_.logits.dtype,
                     .columns = columns_,
                     .maxima = s.maxima.data(),
                     .floor = kernels_.floor_of(s.maxima.data(), blocks_, a_.k, s.bins.data()),
                     .keys = s.keys.data(),
                     .room = static_cast<std::int64_t>(s.keys.size())};
        for (kernels_.collect(c); c.block < blocks_; kernels_.collect(c)) {
            // What comes later loses a tie with what is kept, so that the floor may be the last of these.
            std::nth_element(c.keys, c.keys + a_.k - 1, c.keys + c.count);
            c.count = a_.k;
            c.floor = value_of(c.keys[a_.k - 1]);
        }
        std::sort(c.keys, c.keys + c.count);
        return {c.keys, static_cast<std::size_t>(std::min(c.count, a_.k))};
    }

    void keep(std::int64_t i, float top, double log_one, Scratch& s) const {
        const std::span<const Key> keys = largest(i, s);
        auto n = static_cast<std::int64_t>(keys.size());
        if (a_.method == Method::topp) {
            const std::int64_t most = n;
            double mass = 0;
            for (n = 0; n < most && mass < a_.p; ++n)
                mass += std::exp(static_cast<double>(value_of(keys[n])) - top - log_one);
            n = std::max(n, std::min(most, a_.least));
        }
        a_.k_eff[i] = static_cast<std::int32_t>(n);
        for (std::int64_t j = 0; j < a_.k; ++j) {
            const bool there = j < n;
            a_.ids[i * a_.k + j] = there ? static_cast<std::int32_t>(id_of(keys[j])) : -1;
            a_.logprobs[i * a_.k + j] =
                static_cast<float>(there ? static_cast<double>(value_of(keys[j])) - top - log_one : -infinity);
        }
    }

    // --- Draws

    double drawn_at() const { return temperatures_[0]; }

    // Weights of a block's columns relative to the row's maximum, without those of some keys; returns how many.
    std::int64_t weigh_columns(std::int64_t i, std::int64_t block, float top, std::span<const Key> without,
                               Scratch& s) const {
        const std::int64_t first = block * block_, n = std::min(block_, columns_ - first), tile = first / tile_;
        const Exponential& e = exponentials_[0];
        kernels_.weights(at(i, first), a_.logits.dtype, n, s.reference[tile], e.c, s.raw.data());
        const double f = factor(sums_of(s, tile), top, e);
        for (std::int64_t j = 0; j < n; ++j) s.columns[j] = f * s.raw[j];
        for (const Key key : without) {
            const std::int64_t column = id_of(key) - first;
            if (column >= 0 && column < n) s.columns[column] = 0;
        }
        return n;
    }

    void weigh_blocks(float top, Scratch& s) const {
        double f = 0;
        for (std::int64_t b = 0; b < blocks_; ++b) {
            const std::int64_t first = b * block_;
            if (first % tile_ == 0) f = factor(sums_of(s, first / tile_), top, exponentials_[0]);
            s.weights[b] = f * s.block_sums[b];
        }
    }

    // Weighs the blocks of `keys` again, without the columns of `without`.
    void weigh_blocks_again(std::int64_t i, float top, std::span<const Key> keys, std::span<const Key> without,
                            Scratch& s) const {
        std::vector<std::int64_t> blocks;
        for (const Key key : keys) blocks.push_back(id_of(key) / block_);
        std::sort(blocks.begin(), blocks.end());
        blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
        for (const std::int64_t b : blocks) {
            const std::int64_t n = weigh_columns(i, b, top, without, s);
            s.weights[b] = std::accumulate(s.columns.begin(), s.columns.begin() + n, 0.0);
        }
    }

    // Calls found(column) for each point, in order: the column within which the sum of weights passes the point. What
    // rounding leaves over, at the end of a block or of the row, falls to the last column there that has weight.
    template <class Found>
    void locate(std::int64_t i, float top, std::span<const Key> without, Scratch& s, Found found) const {
        std::int64_t last = blocks_ - 1;
        while (last > 0 && s.weights[last] == 0) --last;
        auto point = s.points.begin();
        double before = 0;
        for (std::int64_t b = 0; b <= last && point != s.points.end(); ++b) {
            const double after = b == last ? infinity : before + s.weights[b];
            if (*point < after) {
                const std::int64_t n = weigh_columns(i, b, top, without, s);
                std::int64_t heavy = -1;
                double sum = before;
                for (std::int64_t j = 0; j < n; ++j) {
                    if (s.columns[j] == 0) continue;
                    heavy = j;
                    sum += s.columns[j];
                    for (; point != s.points.end() && *point < std::min(sum, after); ++point) found(b * block_ + j);
                }
                for (; heavy >= 0 && point != s.points.end() && *point < after; ++point) found(b * block_ + heavy);
            }
            before += s.weights[b];
        }
    }

    void sample(std::int64_t i, float top, Scratch& s) const {
        const double total = std::accumulate(s.weights.begin(), s.weights.end(), 0.0);
        s.points.resize(static_cast<std::size_t>(a_.k));
        for (std::int64_t j = 0; j < a_.k; ++j) s.points[j] = random(i, j) * total;
        std::sort(s.points.begin(), s.points.end());
        const double share = 1 / static_cast<double>(a_.k);
        locate(i, top, {}, s, [&](std::int64_t column) {
            if (s.entries.empty() || s.entries.back().id != column) s.entries.push_back({column, 0});
            s.entries.back().mass += share;
        });
    }

    // With the m largest columns kept for certain and R the weight of the others, l = (k - m) / R, and m is the first
    // number whose next column has l w < 1. The others are met by points 1 / l apart, the first at random: a column
    // shorter than that is met at most once, and with probability l w.
    void pps(std::int64_t i, float top, Scratch& s) const {
        const std::span<const Key> keys = largest(i, s);
        weigh_blocks_again(i, top, keys, keys, s);
        std::vector<double> w, rest(keys.size() + 1);
        const double total = s.totals[0];
        for (const Key key : keys) w.push_back(std::exp((static_cast<double>(value_of(key)) - top) / drawn_at()));
        rest.back() = std::accumulate(s.weights.begin(), s.weights.end(), 0.0);
        for (std::size_t j = keys.size(); j-- > 0;) rest[j] = rest[j + 1] + w[j];
        std::size_t m = 0;
        while (m < keys.size() && w[m] > 0 &&
               w[m] * static_cast<double>(a_.k - static_cast<std::int64_t>(m)) >= rest[m])
            ++m;
        const std::span<const Key> certain = keys.first(m);
        for (std::size_t j = 0; j < m; ++j) s.entries.push_back({id_of(keys[j]), w[j] / total});

        weigh_blocks_again(i, top, keys, certain, s);
        const double others = std::accumulate(s.weights.begin(), s.weights.end(), 0.0);
        const std::int64_t points = others > 0 ? a_.k - static_cast<std::int64_t>(m) : 0;
        const double step = others / static_cast<double>(points), start = random(i, 0);
        s.points.clear();
        for (std::int64_t j = 0; j < points; ++j) s.points.push_back((start + static_cast<double>(j)) * step);
        locate(i, top, certain, s, [&](std::int64_t column) {
            if (s.entries.size() == m || s.entries.back().id != column) s.entries.push_back({column, step / total});
        });
    }

    double random(std::int64_t i, std::int64_t draw) const {
        return uniform(a_.seed, static_cast<std::uint64_t>(a_.first_token + i), static_cast<std::uint32_t>(draw));
    }

    void write_entries(std::int64_t i, float top, double log_one, Scratch& s) const {
        std::erase_if(s.entries,
                      [](const Entry& e) { return !(static_cast<float>(e.mass) > 0); });  // below f32's least
        std::sort(s.entries.begin(), s.entries.end(), [](const Entry& x, const Entry& y) { return x.id < y.id; });
        const auto n = static_cast<std::int64_t>(s.entries.size());
        const double lse = std::log1p(s.others[0]) - log_one / drawn_at();
        double neg_entropy = 0;
        for (std::int64_t j = 0; j < a_.k; ++j) {
            const bool there = j < n;
            const Entry entry = there ? s.entries[j] : Entry{-1, 0};
            const double logprob =
                there ? static_cast<double>(element(a_.logits.row(i), a_.logits.dtype, entry.id)) - top - log_one
                      : -infinity;
            if (there) neg_entropy += entry.mass * (logprob / drawn_at() - lse);
            a_.ids[i * a_.k + j] = static_cast<std::int32_t>(entry.id);
            a_.logprobs[i * a_.k + j] = static_cast<float>(logprob);
            a_.mass[i * a_.k + j] = static_cast<float>(entry.mass);
        }
        a_.k_eff[i] = static_cast<std::int32_t>(n);
        a_.neg_entropy[i] = static_cast<float>(neg_entropy);
    }

    const SelectCall& a_;
    const SelectKernels& kernels_;
    std::int64_t columns_, tile_, tiles_, block_, blocks_, one_;
    std::vector<double> temperatures_;  // those asked for, and 1
    std::vector<Exponential> exponentials_;
};

void check(const SelectCall& call) {
    if (call.k < 1 || call.k > std::numeric_limits<std::int32_t>::max())
        throw ArgumentError("k must be in [1, 2^31), got " + std::to_string(call.k));
    if (call.logits.columns < 1 || call.logits.columns > std::numeric_limits<std::int32_t>::max())
        throw ArgumentError("logits must have 1 to 2^31 - 1 columns, got " + std::to_string(call.logits.columns));
    if (call.sampled() && call.temperatures.size() != 1)
        throw ArgumentError("a sampled method draws at one temperature, got " +
                            std::to_string(call.temperatures.size()));
    for (const double t : call.temperatures)
        if (!(t > 0) || !std::isfinite(t))
            throw ArgumentError("temperatures must be > 0 and finite, got " + std::to_string(t));
}

}  // namespace

void select(const SelectCall& call, const SelectKernels& kernels) {
    check(call);
    if (call.rows > 0) Selection(call, kernels).run();
}

}  // namespace kdfast::cpu
