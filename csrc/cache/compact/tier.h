// Samples of the compact tier on their way to a shard.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cache/compact/learn.h"
#include "cache/store/shard.h"

namespace kdfast::cache {

// A model to encode with, and what a shard keeps of it.
struct CompactModel {
    explicit CompactModel(const Model& model)
        : payload(std::make_shared<const std::vector<std::byte>>(serialise(model))), encoder(model) {}

    ModelPayload payload;
    CompactEncoder encoder;
};

// Makes the fixed blocks of a frame compact ones.
void make_compact(const CompactModel& model, const Layout& layout, FrameHeader& header, std::vector<std::byte>& blocks);

// A model is learned from the first samples, which wait for it as fixed blocks: at most about learn_tokens of them,
// and none over a commit. One that had to be learned from few, as a commit could not wait, is replaced when four times
// as many tokens are known.
class CompactTier {
  public:
    CompactTier(const CacheHeader& header, std::uint64_t shard_bytes, ShardSeries& series);

    // The model to encode with, once no other is to follow; else null. For any thread.
    std::shared_ptr<const CompactModel> model() const;

    // The rest is for the thread that appends. A sample as fixed blocks, whose layout says compact.
    void append(FrameHeader header, const Layout& layout, std::vector<std::byte> fixed_blocks);
    // What waits goes to the shard; `last`: nothing will follow.
    void settle(bool last);

  private:
    static constexpr std::int64_t learn_tokens = 1 << 15;

    struct Waiting {
        FrameHeader header;
        Layout layout;
        std::vector<std::byte> blocks;
    };
    void learn(std::int64_t horizon);

    ShardSeries& series_;
    const std::int64_t shard_tokens_;  // about as many are in a full one
    CompactLearner learner_;
    std::int64_t learned_from_ = 0;  // tokens
    std::vector<Waiting> waiting_;
    std::shared_ptr<const CompactModel> present_;
    mutable std::mutex mutex_;
    std::shared_ptr<const CompactModel> last_;
};

}  // namespace kdfast::cache
