// The dense loss in fp64, from its definitions and without regard to speed, cancellation or how the kernels do it.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "cpu/dense.h"

namespace kdfast::test {

using Vector = std::vector<double>;

inline Vector capped(const cpu::Cap& cap, Vector x) {
    const double scale = static_cast<double>(cap.scale), softcap = static_cast<double>(cap.softcap);
    for (double& v : x)
        if (v != -std::numeric_limits<double>::infinity())
            v = softcap == 0 ? scale * v : softcap * std::tanh(scale * v / softcap);
    return x;
}

// The derivative of a capped logit by what is stored of it.
inline double slope(const cpu::Cap& cap, double logit) {
    if (logit == -std::numeric_limits<double>::infinity()) return 0;
    const double y = cap.softcap == 0 ? 0 : logit / static_cast<double>(cap.softcap);
    return static_cast<double>(cap.scale) * (1 - y * y);
}

inline double logsumexp(const Vector& x) {
    double top = -std::numeric_limits<double>::infinity();
    for (double v : x) top = v > top || std::isnan(v) ? v : top;
    if (std::isinf(top)) return top;
    double sum = 0;
    for (double v : x) sum += std::exp(v - top);
    return top + std::log(sum);
}

inline Vector log_softmax(const Vector& logits, double temperature) {
    Vector out;
    for (double v : logits) out.push_back(v / temperature);
    const double lse = logsumexp(out);
    for (double& v : out) v -= lse;
    return out;
}

// One summand of a divergence from log q and log p, and p times its derivative by p; 0 log 0 = 0 throughout.
struct Summand {
    double value, student;
};

inline Summand summand(const cpu::Term& term, double lq, double lp) {
    using cpu::Divergence;
    const double p = std::exp(lp), q = std::exp(lq), w = static_cast<double>(term.parameter);
    const auto x_log = [](double x, double log_ratio) { return x == 0 ? 0.0 : x * log_ratio; };
    const auto mixed = [&](double of_q, double of_p) { return std::log(of_q * q + of_p * p); };
    switch (term.kind) {
        case Divergence::forward_kl:
            return {x_log(q, lq - lp), -q};
        case Divergence::reverse_kl:
            return {x_log(p, lp - lq), x_log(p, lp - lq + 1)};
        case Divergence::jsd: {
            const double lm = mixed(w, 1 - w);
            return {w * x_log(q, lq - lm) + (1 - w) * x_log(p, lp - lm), (1 - w) * x_log(p, lp - lm)};
        }
        case Divergence::skew_forward_kl: {
            const double lm = mixed(w, 1 - w);
            return {x_log(q, lq - lm), -(1 - w) * x_log(q, std::exp(lp - lm))};
        }
        case Divergence::skew_reverse_kl: {
            const double lm = mixed(1 - w, w);
            return {x_log(p, lp - lm), x_log(p, lp - lm + 1 - w * std::exp(lp - lm))};
        }
        case Divergence::tvd:
            return {std::abs(p - q) / 2, p > q ? p / 2 : p < q ? -p / 2 : 0 * (p + q)};
        case Divergence::alpha_div: {
            const double g = std::pow(q, w) * std::pow(p, 1 - w);
            return {(w * q + (1 - w) * p - g) / (w * (1 - w)), -g / w};
        }
        case Divergence::hellinger:
            return {(p + q) / 2 - std::sqrt(p * q), -std::sqrt(p * q) / 2};
    }
    return {};
}

// One row of a call. Logits are what the kernels read, exactly.
struct OracleRow {
    Vector z;
    std::vector<Vector> teachers;  // of the distilled columns
    Vector weights;                // by teacher
    bool mix_logits = false;
    std::vector<cpu::Term> terms;
    double temperature = 1;
    std::int64_t label = cpu::no_label;
    double smoothing = 0;
    double c_soft = 0, c_hard = 0, c_z = 0;

    Vector log_teacher() const {
        Vector out(teachers[0].size(), 0.0);
        for (std::size_t k = 0; k < teachers.size(); ++k) {
            if (weights[k] == 0) continue;
            const Vector lq = mix_logits ? teachers[k] : log_softmax(teachers[k], temperature);
            for (std::size_t c = 0; c < out.size(); ++c) out[c] += weights[k] * (mix_logits ? lq[c] : std::exp(lq[c]));
        }
        if (mix_logits) return log_softmax(out, temperature);
        for (double& v : out) v = std::log(v);
        return out;
    }
    Vector distilled() const { return {z.begin(), z.begin() + static_cast<std::ptrdiff_t>(teachers[0].size())}; }

    double soft() const {
        if (teachers.empty()) return 0;
        const Vector lq = log_teacher(), lp = log_softmax(distilled(), temperature);
        double total = 0;
        for (std::size_t c = 0; c < lq.size(); ++c)
            for (const cpu::Term& t : terms) total += static_cast<double>(t.weight) * summand(t, lq[c], lp[c]).value;
        return total;
    }

    double hard() const {
        if (label == cpu::no_label) return 0;
        const Vector lp = log_softmax(z, 1);
        double sum = 0, present = 0;
        for (std::size_t c = 0; c < z.size(); ++c)
            if (z[c] > -std::numeric_limits<double>::infinity()) sum -= lp[c], ++present;
        return -(1 - smoothing) * lp[static_cast<std::size_t>(label)] + (smoothing > 0 ? smoothing * sum / present : 0);
    }

    double z2() const { return std::pow(logsumexp(z), 2); }
    double loss() const { return c_soft * soft() + (label == cpu::no_label ? 0 : c_hard) * hard() + c_z * z2(); }

    // `magnitude` bounds what is added up to a column's gradient: rounding errors are relative to that.
    struct Gradient {
        Vector value, magnitude;
    };
    Gradient gradient() const {
        const double lse = logsumexp(z), present_limit = -std::numeric_limits<double>::infinity();
        double present = 0;
        for (double v : z) present += v > present_limit;
        const double hard_factor = label == cpu::no_label ? 0 : c_hard;
        Gradient g{Vector(z.size(), 0.0), Vector(z.size(), 0.0)};
        const auto add = [&](std::size_t c, double v) { g.value[c] += v, g.magnitude[c] += std::abs(v); };
        for (std::size_t c = 0; c < z.size(); ++c) {
            const double p = std::exp(z[c] - lse);
            add(c, hard_factor * p);
            add(c, 2 * c_z * lse * p);
            if (smoothing > 0 && z[c] > present_limit) add(c, -hard_factor * smoothing / present);
        }
        if (label != cpu::no_label) add(static_cast<std::size_t>(label), -hard_factor * (1 - smoothing));
        if (teachers.empty() || c_soft == 0) return g;
        const Vector lq = log_teacher(), lp = log_softmax(distilled(), temperature);
        Vector student(lq.size(), 0.0);
        double total = 0, steepest = 1;
        for (std::size_t c = 0; c < lq.size(); ++c) {
            for (const cpu::Term& t : terms)
                student[c] += static_cast<double>(t.weight) * summand(t, lq[c], lp[c]).student;
            total += student[c];
        }
        for (const cpu::Term& t : terms) steepest += static_cast<double>(t.weight);
        for (std::size_t c = 0; c < lq.size(); ++c) {
            const double p = std::exp(lp[c]), q = std::exp(lq[c]);
            g.value[c] += c_soft / temperature * (student[c] - p * total);
            g.magnitude[c] +=
                std::abs(c_soft) / temperature * steepest * ((p + q) * (1 + std::abs(total)) + std::abs(student[c]));
        }
        return g;
    }

    // abs(log p - log q) by column.
    Vector log_ratios() const {
        Vector out = log_softmax(distilled(), temperature);
        const Vector lq = log_teacher();
        for (std::size_t c = 0; c < out.size(); ++c) out[c] = std::abs(out[c] - lq[c]);
        return out;
    }

    double dsoft_dtemperature() const {
        const double step = 1e-6 * temperature;  // small, so that the total variation has few kinks in it
        OracleRow up = *this, down = *this;
        up.temperature += step;
        down.temperature -= step;
        return (up.soft() - down.soft()) / (2 * step);
    }
};

}  // namespace kdfast::test
