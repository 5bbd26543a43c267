// Learns the model of compact blocks from the first targets that a writer gets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache/compact/compact.h"

namespace kdfast::cache {

class CompactLearner {
  public:
    CompactLearner(std::uint32_t vocab_size, std::size_t temperatures);

    // Looks at rows that CompactEncoder would take; only their ids are kept.
    void add(const Layout& layout, const QuantisedSource& rows);
    std::int64_t tokens() const { return static_cast<std::int64_t>(ends_.size()) - 1; }
    // Enough: what is added from here on is not looked at.
    bool full() const { return ids_.size() >= most_ids; }
    // The model for what was added, expecting `horizon` tokens in all: the larger it is, the larger a model pays.
    // Without any token added, a model that writes everything raw. Deterministic.
    Model learn(std::int64_t horizon) const;

  private:
    static constexpr std::size_t most_ids = std::size_t{1} << 24;
    static constexpr std::size_t float_heads = std::size_t{1} << (32 - float_raw);

    std::uint32_t vocab_size_;
    std::vector<std::uint32_t> ids_;
    std::vector<std::size_t> ends_{0};  // of row j in ids_ at j + 1
    std::vector<double> kept_, top_, gold_;
    std::vector<std::vector<double>> lse_, deltas_;  // by value, float by its high bits
};

}  // namespace kdfast::cache
