#include "core/pool.h"

#include <cstdlib>
#include <new>
#include <utility>

#include "core/pages.h"

namespace kdfast {

void Pool::Free::operator()(std::byte* data) const { std::free(data); }

Pool::Block Pool::take(std::size_t bytes) {
    std::size_t best = blocks_.size();
    for (std::size_t i = blocks_.size(); i-- > 0;)
        if (blocks_[i].bytes >= bytes && blocks_[i].bytes / 2 <= bytes &&
            (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes))
            best = i;
    if (best < blocks_.size()) {
        Block block = std::move(blocks_[best]);
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
        kept_ -= block.bytes;
        return block;
    }
    // Whole pages, so that a block serves what is a little larger, too; aligned to huge ones where it has some.
    constexpr std::size_t step = std::size_t{64} << 10, huge = std::size_t{2} << 20;
    const std::size_t rounded = (bytes + step - 1) / step * step;
    const std::size_t alignment = rounded >= huge ? huge : std::size_t{4096};
    const std::size_t room = (rounded + alignment - 1) / alignment * alignment;  // which aligned_alloc asks for
    auto* data = static_cast<std::byte*>(std::aligned_alloc(alignment, room));
    if (!data) throw std::bad_alloc();
    advise_huge_pages(data, room);
    return {std::unique_ptr<std::byte, Free>(data), room};
}

void Pool::give(Block block) {
    if (block.bytes > limit_) return;
    kept_ += block.bytes;
    blocks_.push_back(std::move(block));
    std::size_t leave = 0;
    for (; kept_ > limit_; ++leave) kept_ -= blocks_[leave].bytes;
    blocks_.erase(blocks_.begin(), blocks_.begin() + static_cast<std::ptrdiff_t>(leave));
}

}  // namespace kdfast
