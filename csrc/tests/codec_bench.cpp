// Speed, size and error of the block codecs on one core. Usage: codec_bench [kept [grid]]     KDFAST_FORCE_ISA chooses.
//
// The teacher is synthetic. A token's logits are -a log(rank) plus normal noise of 0.5 nats on the first 1024 ranks,
// with an exponent a of its own, uniform in [1.2, 2.4]: between an open and a settled continuation. Ids go to ranks by
// a popularity of their own, Zipf's (id + 20)^-1.32: a byte-pair vocabulary numbers its merges by their frequency, and
// what is frequent is likely in most contexts. The ids of top-64 rows then have an order-0 entropy of about 12 bits, as
// those of real teachers do; uniform ones would have 17. That matters to the gaps of the drawn codec alone.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <unordered_map>
#include <vector>

#include "cache/codec.h"
#include "cache/crc/crc32c.h"
#include "cpu/dispatch.h"

using namespace kdfast::cache;

namespace {

constexpr std::uint32_t vocab_size = 128256;
constexpr std::int64_t sample_tokens = 2048, block_tokens = 128, samples = 8, tokens = samples * sample_tokens;
constexpr std::size_t noisy = 1024;  // ranks
constexpr double temperature = 2;

using Random = std::mt19937_64;
double uniform(Random& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }

// By the inverse of the integral of (id + 20)^-1.32.
std::int32_t popular_id(Random& random) {
    constexpr double b = 20, power = 1 - 1.32;
    static const double low = std::pow(b, power), high = std::pow(vocab_size + b, power);
    return static_cast<std::int32_t>(std::pow(low + uniform(random) * (high - low), 1 / power) - b);
}

struct Token {
    std::vector<double> logits;     // of the noisy ranks, falling; less the logsumexp of all
    std::vector<std::int32_t> ids;  // theirs
    double exponent, lse2, shift;   // lse at temperature 2; logsumexp of all
};

// sum of rank^-power beyond the noisy ranks, by its integral
double tail_sum(double power) {
    const double from = noisy + 0.5, to = vocab_size + 0.5;
    return std::abs(power - 1) < 1e-9 ? std::log(to / from)
                                      : (std::pow(to, 1 - power) - std::pow(from, 1 - power)) / (1 - power);
}

Token draw_token(Random& random) {
    Token t;
    t.exponent = 1.2 + 1.2 * uniform(random);
    std::normal_distribution<double> noise(0, 0.5);
    double sums[2] = {tail_sum(t.exponent), tail_sum(t.exponent / temperature)};
    for (std::size_t r = 1; r <= noisy; ++r) {
        t.logits.push_back(-t.exponent * std::log(static_cast<double>(r)) + noise(random));
        sums[0] += std::exp(t.logits.back());
        sums[1] += std::exp(t.logits.back() / temperature);
    }
    std::sort(t.logits.begin(), t.logits.end(), std::greater<>());
    t.shift = std::log(sums[0]);
    t.lse2 = std::log(sums[1]) - t.shift / temperature;
    for (double& x : t.logits) x -= t.shift;
    std::vector<bool> taken(vocab_size);
    while (t.ids.size() < noisy) {
        const std::int32_t id = popular_id(random);
        if (taken[static_cast<std::size_t>(id)]) continue;
        taken[static_cast<std::size_t>(id)] = true;
        t.ids.push_back(id);
    }
    return t;
}

struct Rows {
    Layout layout;
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> logprobs, mass, lse, neg_entropy;

    Rows(Codec codec, Method method, std::uint32_t kept, std::uint32_t grid, double draws) {
        layout.codec = codec;
        layout.method = method;
        layout.vocab_size = vocab_size;
        layout.kept = kept;
        layout.grid = grid;
        layout.draws = draws;
        layout.ragged = codec == Codec::drawn;
        layout.temperatures = {temperature};
        const auto size = static_cast<std::size_t>(tokens) * kept;
        ids.resize(size);
        (codec == Codec::drawn ? mass : logprobs).resize(size);
        lse.resize(tokens);
        k_eff.resize(tokens);
        neg_entropy.resize(tokens);
    }
    template <class T>
    T at(std::int64_t first, std::int64_t count) {
        T t;
        const std::int64_t kept = layout.kept;
        t.tokens = count;
        t.ids = ids.data() + first * kept;
        if (!logprobs.empty()) t.logprobs = logprobs.data() + first * kept;
        if (!mass.empty()) t.mass = mass.data() + first * kept;
        t.lse = lse.data() + first;
        t.lse_stride = tokens;
        t.k_eff = k_eff.data() + first;
        if (!mass.empty()) t.neg_entropy = neg_entropy.data() + first;
        return t;
    }
};

void keep(Rows& rows, std::int64_t i, const Token& t) {
    const auto kept = static_cast<std::size_t>(rows.layout.kept);
    for (std::size_t j = 0; j < kept; ++j) {
        rows.ids[static_cast<std::size_t>(i) * kept + j] = t.ids[j];
        rows.logprobs[static_cast<std::size_t>(i) * kept + j] = static_cast<float>(t.logits[j]);
    }
    rows.lse[static_cast<std::size_t>(i)] = static_cast<float>(t.lse2);
}

// With replacement, N of them; or K in expectation, each by itself with probability min(1, l q).
void draw(Rows& rows, std::int64_t i, const Token& t, Random& random, double expected) {
    const auto row = static_cast<std::size_t>(i), kept = static_cast<std::size_t>(rows.layout.kept);
    std::unordered_map<std::int32_t, double> mass;
    if (rows.layout.method == Method::sample) {
        std::vector<double> cumulative;
        double sum = 0;
        for (const double x : t.logits) cumulative.push_back(sum += std::exp(x));
        for (int n = 0; n < static_cast<int>(rows.layout.draws); ++n) {
            const auto rank = std::lower_bound(cumulative.begin(), cumulative.end(), uniform(random));
            mass[rank == cumulative.end() ? popular_id(random)
                                          : t.ids[static_cast<std::size_t>(rank - cumulative.begin())]] +=
                1 / rows.layout.draws;
        }
    } else {
        double low = 1, high = 1e9;
        const auto power = [&](double l) {
            double sum = 0;
            for (const double x : t.logits) sum += std::min(1.0, l * std::exp(x));
            return sum + l * tail_sum(t.exponent) * std::exp(-t.shift);
        };
        while (high / low > 1.0001) (power(std::sqrt(low * high)) < expected ? low : high) = std::sqrt(low * high);
        for (std::size_t r = 0; r < t.logits.size(); ++r)
            if (const double q = std::exp(t.logits[r]); uniform(random) < low * q)
                mass[t.ids[r]] = std::max(q, 1 / low);
        std::poisson_distribution<int> beyond(low * tail_sum(t.exponent) * std::exp(-t.shift));
        for (int n = beyond(random); n > 0; --n) mass.emplace(popular_id(random), 1 / low);
    }
    std::size_t j = row * kept;
    for (const auto& [id, m] : mass) {
        if (j == (row + 1) * kept) break;
        rows.ids[j] = id;
        rows.mass[j++] = static_cast<float>(m);
    }
    rows.k_eff[row] = static_cast<std::int32_t>(j - row * kept);
    rows.lse[row] = static_cast<float>(t.lse2);
    rows.neg_entropy[row] = -2;
}

struct Stored {
    std::vector<std::byte> bytes;
    std::vector<std::size_t> begins;  // of blocks, and the end
    std::vector<std::uint32_t> checksums;

    explicit Stored(Rows& rows) {
        for (std::int64_t first = 0; first < tokens; first += block_tokens) {
            begins.push_back(bytes.size());
            encode(rows.layout, rows.at<Source>(first, block_tokens), bytes);
        }
        begins.push_back(bytes.size());
        for (std::size_t b = 0; b + 1 < begins.size(); ++b) checksums.push_back(crc32c(block(b)));
        bytes.resize(bytes.size() + padding_after_block);
    }
    std::span<const std::byte> block(std::size_t b) const {
        return std::span(bytes).subspan(begins[b], begins[b + 1] - begins[b]);
    }
    // The tokens [first, first + count), from the blocks that they lie in.
    void read(Rows& rows, std::int64_t first, std::int64_t count) const {
        for (std::int64_t at = first; at < first + count;) {
            const std::int64_t b = at / block_tokens, within = at % block_tokens;
            const std::int64_t n = std::min(block_tokens - within, first + count - at);
            const auto bytes_of = block(static_cast<std::size_t>(b));
            if (crc32c(bytes_of) != checksums[static_cast<std::size_t>(b)]) std::abort();
            decode(rows.layout, {bytes_of, block_tokens, within, rows.at<Destination>(at - first, n)});
            at += n;
        }
    }
    // With the frame's header: 88 bytes, a key of 16, 16 behind, and 8 for each block.
    double bytes_per_token() const {
        const double header = 88 + 16 + 8 + 8.0 * sample_tokens / block_tokens;
        return (static_cast<double>(begins.back()) + header * samples) / static_cast<double>(tokens);
    }
};

// Median seconds of 15 calls.
double seconds(const std::function<void()>& call) {
    std::vector<double> times;
    for (int i = 0; i < 15; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        call();
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    std::nth_element(times.begin(), times.begin() + 7, times.end());
    return times[7];
}

void report_speed(const char* name, Rows& rows, const Stored& stored) {
    Rows out = rows;
    const double n = tokens;
    std::vector<std::byte> bytes;
    const double encoding = seconds([&] {
        bytes.clear();
        for (std::int64_t first = 0; first < tokens; first += block_tokens)
            encode(rows.layout, rows.at<Source>(first, block_tokens), bytes);
    });
    const double decoding = seconds([&] {
        for (std::int64_t s = 0; s < samples; ++s) stored.read(out, s * sample_tokens, sample_tokens);
    });
    const double checking = seconds([&] {
        for (std::size_t b = 0; b < stored.checksums.size(); ++b)
            if (crc32c(stored.block(b)) != stored.checksums[b]) std::abort();
    });
    Random random(1);
    constexpr int ranges = 500;
    const double range = seconds([&] {
        for (int i = 0; i < ranges; ++i)
            stored.read(out,
                        static_cast<std::int64_t>(random() % samples) * sample_tokens +
                            static_cast<std::int64_t>(random() % (sample_tokens - 256)),
                        256);
    });
    std::printf(
        "%-7s encode %6.2f M tokens/s, decode %6.2f M tokens/s with checksum, range of 256 %6.2f us, crc32c %5.1f "
        "GB/s\n",
        name, n / encoding * 1e-6, n / decoding * 1e-6, range / ranges * 1e6,
        static_cast<double>(stored.begins.back()) / checking * 1e-9);
}

double binary_kl(double p, double q) { return p * std::log(p / q) + (1 - p) * std::log1p((q - p) / (1 - q)); }

// KL(true || stored) of the kept entries scaled to 1, and of the tail as one outcome.
void report_error(Rows& rows, const Stored& stored, const std::vector<Token>& teacher) {
    Rows out = rows;
    const auto kept = static_cast<std::size_t>(rows.layout.kept);
    stored.read(out, 0, tokens);
    for (const double T : {1.0, temperature}) {
        double sum[2] = {}, most[2] = {}, most_of_all = 0;
        for (std::size_t i = 0; i < teacher.size(); ++i) {
            double mass[2] = {}, head = 0;
            std::vector<double> p, q;
            for (std::size_t j = 0; j < kept; ++j) {
                p.push_back(std::exp(teacher[i].logits[j] / T - (T == 1 ? 0 : teacher[i].lse2)));
                q.push_back(std::exp(out.logprobs[i * kept + j] / T - (T == 1 ? 0 : double{out.lse[i]})));
                mass[0] += p.back();
                mass[1] += q.back();
            }
            for (std::size_t j = 0; j < kept; ++j) head += p[j] / mass[0] * std::log(p[j] / mass[0] / (q[j] / mass[1]));
            const double parts[2] = {mass[0] * head, binary_kl(mass[0], mass[1])};
            for (int part = 0; part < 2; ++part) {
                sum[part] += parts[part];
                most[part] = std::max(most[part], parts[part]);
            }
            most_of_all = std::max(most_of_all, parts[0] + parts[1]);
        }
        const auto n = static_cast<double>(teacher.size());
        std::printf("        T = %g: KL mean %.2e (head %.2e, tail %.2e), max %.2e (head %.2e, tail %.2e)\n", T,
                    (sum[0] + sum[1]) / n, sum[0] / n, sum[1] / n, most_of_all, most[0], most[1]);
    }
}

double entropy(const Rows& rows) {
    std::vector<double> counts(vocab_size);
    for (const std::int32_t id : rows.ids) counts[static_cast<std::size_t>(id)] += 1;
    double sum = 0;
    for (const double c : counts)
        if (c > 0)
            sum -= c / static_cast<double>(rows.ids.size()) * std::log2(c / static_cast<double>(rows.ids.size()));
    return sum;
}

}  // namespace

int main(int count, char** arguments) {
    const auto kept = static_cast<std::uint32_t>(count > 1 ? std::atoi(arguments[1]) : 64);
    const auto grid = static_cast<std::uint32_t>(count > 2 ? std::atoi(arguments[2]) : 4);
    if (kept < 1 || kept > noisy) return std::printf("kept must be 1 to %zu\n", noisy), 1;
    Random random(7);
    std::vector<Token> teacher;
    Rows fixed(Codec::fixed, Method::topk, kept, grid, 0);
    Rows sample(Codec::drawn, Method::sample, 40, grid, 40), pps(Codec::drawn, Method::pps, 40, grid, 0);
    for (std::int64_t i = 0; i < tokens; ++i) {
        teacher.push_back(draw_token(random));
        keep(fixed, i, teacher.back());
        draw(sample, i, teacher.back(), random, 0);
        draw(pps, i, teacher.back(), random, 12);
        teacher.back().logits.resize(kept);
        teacher.back().ids = {};
    }
    std::printf("%s, K = %u, V = %u, grid %u, %lld tokens, blocks of %lld; ids have %.2f bits\n",
                std::string(kdfast::cpu::kernels().isa).c_str(), kept, vocab_size, grid, static_cast<long long>(tokens),
                static_cast<long long>(block_tokens), entropy(fixed));
    const Stored fixed_stored(fixed);
    std::printf("fixed   %.1f bytes/token with the frame's header\n", fixed_stored.bytes_per_token());
    report_error(fixed, fixed_stored, teacher);
    report_speed("fixed", fixed, fixed_stored);
    for (Rows* rows : {&sample, &pps}) {
        const char* name = rows == &sample ? "sample" : "pps";
        double entries = 0;
        for (const std::int32_t k : rows->k_eff) entries += k;
        const Stored stored(*rows);
        std::printf("%-7s %.1f bytes/token with the frame's header, %.1f entries a token\n", name,
                    stored.bytes_per_token(), entries / static_cast<double>(tokens));
        report_speed(name, *rows, stored);
    }
    return 0;
}
