// The models of compact frames that a reader has met, ready to decode with.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache/compact/compact.h"
#include "cache/store/file.h"

namespace kdfast::cache {

// Lists that only grow and are entered without a lock: a process forked from one whose other threads were at work
// would wait for theirs for ever. Shards of one writer have one model, which is kept once.
class ModelStore {
  public:
    ModelStore(std::size_t shards, std::uint32_t vocab_size, std::size_t temperatures);
    ~ModelStore();
    ModelStore(const ModelStore&) = delete;
    ModelStore& operator=(const ModelStore&) = delete;

    // That of shard number `shard` at `offset`, read from its file when it is first asked for.
    const CompactDecoder& get(std::uint32_t shard, std::uint64_t offset, const File& file, std::uint64_t shard_id,
                              std::uint64_t end) const;

  private:
    struct Known {
        std::vector<std::byte> payload;
        CompactDecoder decoder;
        const Known* next = nullptr;
    };
    struct Placed {
        std::uint64_t offset;
        const Known* model;
        const Placed* next = nullptr;
    };
    const Known& known(std::vector<std::byte> payload) const;

    const std::uint32_t vocab_size_;
    const std::size_t temperatures_;
    mutable std::atomic<const Known*> known_ = nullptr;
    mutable std::vector<std::atomic<const Placed*>> placed_;  // of each shard
};

}  // namespace kdfast::cache
