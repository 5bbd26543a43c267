#include "cache/compact/tier.h"

#include <algorithm>
#include <utility>

#include "cache/compact/block.h"
#include "cache/crc/crc32c.h"

namespace kdfast::cache {
namespace {

constexpr std::int64_t bytes_of_token = 128;  // about as many in a compact block of 64 entries

template <class Each>
void for_each_block(const Layout& layout, const FrameHeader& header, Bytes blocks, Each each) {
    std::size_t at = 0;
    for (std::size_t b = 0; b < header.blocks.size(); ++b) {
        const Bytes block = blocks.subspan(at, header.blocks[b].bytes);
        each(QuantisedRows::of_fixed(layout, block, header.tokens_of(b)));
        at += block.size();
    }
}

}  // namespace

void make_compact(const CompactModel& model, const Layout& layout, FrameHeader& header,
                  std::vector<std::byte>& blocks) {
    std::vector<std::byte> compact;
    std::vector<BlockEntry> entries;
    for_each_block(layout, header, blocks, [&](const QuantisedRows& rows) {
        const std::size_t before = compact.size();
        model.encoder.encode(layout, rows.source(), compact);
        const Bytes block = Bytes(compact).subspan(before);
        entries.push_back({static_cast<std::uint32_t>(block.size()), crc32c(block)});
    });
    blocks = std::move(compact);
    header.blocks = std::move(entries);
}

CompactTier::CompactTier(const CacheHeader& header, std::uint64_t shard_bytes, ShardSeries& series)
    : series_(series),
      shard_tokens_(static_cast<std::int64_t>(shard_bytes / bytes_of_token)),
      learner_(header.vocab_size, header.stored_temperatures().size()) {}

std::shared_ptr<const CompactModel> CompactTier::model() const {
    const std::lock_guard lock(mutex_);
    return last_;
}

void CompactTier::append(FrameHeader header, const Layout& layout, std::vector<std::byte> fixed_blocks) {
    if (last_) {
        make_compact(*last_, layout, header, fixed_blocks);
        series_.append(header, fixed_blocks, last_->payload);
        return;
    }
    for_each_block(layout, header, fixed_blocks,
                   [&](const QuantisedRows& rows) { learner_.add(layout, rows.source()); });
    waiting_.push_back({std::move(header), layout, std::move(fixed_blocks)});
    if (learner_.tokens() < learn_tokens && !learner_.full()) return;
    learn(std::max(shard_tokens_, learner_.tokens()));
    {
        const std::lock_guard lock(mutex_);
        last_ = present_;
    }
    settle(false);
}

void CompactTier::learn(std::int64_t horizon) {
    learned_from_ = learner_.tokens();
    present_ = std::make_shared<const CompactModel>(learner_.learn(horizon));
}

void CompactTier::settle(bool last) {
    if (waiting_.empty()) return;
    if (!last_ && learner_.tokens() >= 4 * learned_from_) {
        std::int64_t tokens = 0;
        for (const Waiting& w : waiting_) tokens += w.header.tokens;
        learn(last ? tokens : 4 * learner_.tokens());
    }
    for (Waiting& w : waiting_) {
        make_compact(*present_, w.layout, w.header, w.blocks);
        series_.append(w.header, w.blocks, present_->payload);
    }
    waiting_.clear();
}

}  // namespace kdfast::cache
