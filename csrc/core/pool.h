// Memory for results that come and go: what one has left serves the next.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace kdfast {

// Fresh pages of a batch of targets cost more than reading them does, and malloc gives large blocks back to the system.
// Keeps up to `limit` bytes of free blocks, those that came back last. Not for several threads at once.
class Pool {
  public:
    explicit Pool(std::size_t limit) : limit_(limit) {}

    struct Free {
        void operator()(std::byte* data) const;
    };
    struct Block {
        std::unique_ptr<std::byte, Free> data;
        std::size_t bytes = 0;  // at least as many as were asked for
    };

    // Uninitialised. Of the blocks that are kept the smallest that is large enough, but for one of more than twice
    // that; of equal ones the last that came back, which is likely still in the processor's cache.
    Block take(std::size_t bytes);
    void give(Block block);
    std::size_t kept() const { return kept_; }

  private:
    std::size_t limit_, kept_ = 0;
    std::vector<Block> blocks_;  // free ones, oldest first
};

}  // namespace kdfast
