// Memory that comes back.
#include "core/pool.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "harness.h"

using namespace kdfast;

TEST(pool_gives_again_what_came_back) {
    Pool pool(std::size_t{8} << 20);
    Pool::Block block = pool.take(100000);
    CHECK(block.bytes >= 100000);
    const std::byte* data = block.data.get();
    std::memset(block.data.get(), 1, block.bytes);
    const std::size_t bytes = block.bytes;
    pool.give(std::move(block));
    CHECK_EQUAL(pool.kept(), bytes);
    CHECK(pool.take(bytes / 2 - 1).data.get() != data);  // too small for it
    Pool::Block again = pool.take(bytes);
    CHECK(again.data.get() == data);
    CHECK_EQUAL(pool.kept(), std::size_t{0});
    CHECK(pool.take(bytes).data.get() != data);
}

TEST(pool_gives_the_smallest_that_is_large_enough) {
    Pool pool(std::size_t{64} << 20);
    std::vector<Pool::Block> blocks;
    for (const std::size_t kib : {512, 256, 384}) blocks.push_back(pool.take(kib << 10));
    const std::byte* smallest = blocks[2].data.get();
    for (Pool::Block& block : blocks) pool.give(std::move(block));
    CHECK(pool.take(std::size_t{300} << 10).data.get() == smallest);
}

TEST(pool_keeps_no_more_than_its_limit) {
    Pool pool(std::size_t{1} << 20);
    std::vector<Pool::Block> blocks;
    for (int i = 0; i < 40; ++i) blocks.push_back(pool.take(1 + random() % 200000));
    const std::byte* last = blocks.back().data.get();
    const std::size_t bytes = blocks.back().bytes;
    for (Pool::Block& block : blocks) {
        pool.give(std::move(block));
        CHECK(pool.kept() <= std::size_t{1} << 20);
    }
    CHECK(pool.kept() > (std::size_t{1} << 20) - (std::size_t{256} << 10));
    bool found = false;  // the oldest have left, and not the last
    for (Pool::Block kept = pool.take(bytes); pool.kept() > 0 && !found; kept = pool.take(bytes))
        found = kept.data.get() == last;
    CHECK(found);
    pool.give(pool.take(std::size_t{2} << 20));
    CHECK(pool.kept() <= std::size_t{1} << 20);
}

TEST(pool_blocks_begin_at_pages) {
    Pool pool(0);
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{5000}, std::size_t{5} << 20}) {
        const Pool::Block block = pool.take(bytes);
        CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(block.data.get()) % 4096, std::uintptr_t{0});
        std::memset(block.data.get(), 0, bytes);
    }
    pool.give(pool.take(1));
    CHECK_EQUAL(pool.kept(), std::size_t{0});
}
