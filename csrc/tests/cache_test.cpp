// Writers and readers on a real directory: many at once, errors from the threads behind a writer, damage.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <latch>
#include <thread>

#include "cache/index/update.h"
#include "cache/store/maintenance.h"
#include "cache_case.h"
#include "core/error.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

void many_writers_and_readers(Codec tier) {
    const Folder folder;
    constexpr int writers = 4, samples = 25;
    std::latch open(writers);  // one that opens later finds what the others have committed, and leaves it out
    std::vector<std::thread> threads;
    for (int w = 0; w < writers; ++w)
        threads.emplace_back([&, w] {
            Writer writer(folder.path(), options(tier));
            open.arrive_and_wait();
            for (int n = 0; n < samples; ++n) {
                writer.write(Targets8(n).sample(key_of(w, n)));
                writer.write(Targets8(7).sample("shared"));
                if (n % 10 == 9) writer.commit();
            }
            writer.close();
        });
    for (std::thread& t : threads) t.join();

    const Reader reader(folder.path());
    CHECK_EQUAL(reader.catalog().size(), std::uint64_t{writers * samples + 1});
    std::vector<std::thread> readers;
    std::vector<std::string> failures(3);
    for (int r = 0; r < 3; ++r)
        readers.emplace_back([&, r] {
            try {
                for (int n = 0; n < samples; ++n) check_sample(reader, key_of((n + r) % writers, n), n);
            } catch (const std::exception& error) {
                failures[static_cast<std::size_t>(r)] = error.what();
            }
        });
    for (std::thread& t : readers) t.join();
    for (const std::string& failure : failures) CHECK_EQUAL(failure, std::string());
    check_sample(reader, "shared", 7);
    const Verified verified = verify(folder.path(), 2);
    CHECK(verified.faults.empty());
    CHECK_EQUAL(verified.samples, std::uint64_t{writers * (samples + 1)});
}

}  // namespace

TEST(cache_many_writers_and_readers) {
    for (const Codec tier : tiers) many_writers_and_readers(tier);
}

namespace {

void values_cost_their_sample_alone(Codec tier) {
    const Folder folder;
    Writer writer(folder.path(), options(tier));
    writer.write(Targets8(1).sample("good"));
    Targets8 bad(2);
    bad.ids[5] = vocab_size;
    CHECK_THROWS(ArgumentError, writer.write(bad.sample("bad")));
    CHECK(!writer.has("bad"));
    writer.write(Targets8(3).sample("late"));
    CHECK_EQUAL(writer.close(), std::uint64_t{2});
    const Reader reader(folder.path());
    CHECK_EQUAL(reader.catalog().size(), std::uint64_t{2});
    check_sample(reader, "good", 1);
    check_sample(reader, "late", 3);
}

// Of a folder that is gone: a shard cannot be given its finished name.
void errors_of_the_threads_behind_a_writer(Codec tier) {
    const Folder folder;
    Writer writer(folder.path(), options(tier));
    writer.write(Targets8(1).sample("good"));
    CHECK_EQUAL(writer.commit(), std::uint64_t{1});
    std::filesystem::remove_all(folder.path());
    CHECK_THROWS(Fault, writer.close());
    CHECK_THROWS(Fault, writer.write(Targets8(3).sample("late")));
    CHECK_THROWS(Fault, writer.commit());
}

}  // namespace

TEST(cache_values_cost_their_sample_alone) {
    for (const Codec tier : tiers) values_cost_their_sample_alone(tier);
}

TEST(cache_errors_of_the_threads_behind_a_writer) {
    for (const Codec tier : tiers) errors_of_the_threads_behind_a_writer(tier);
}

namespace {

void writer_that_is_dropped(Codec tier) {
    const Folder folder;
    {
        Writer writer(folder.path(), options(tier));
        writer.write(Targets8(1).sample("committed"));
        CHECK_EQUAL(writer.commit(), std::uint64_t{1});
        for (int n = 0; n < 20; ++n) writer.write(Targets8(n).sample(key_of(0, n)));
    }
    {
        const Reader reader(folder.path());
        check_sample(reader, "committed", 1);
    }
    const Repaired repaired = repair(folder.path());
    CHECK(repaired.lost.empty());
    const Reader reader(folder.path());
    check_sample(reader, "committed", 1);
    for (const CatalogShard& shard : reader.catalog().shards()) CHECK(shard.finished);
}

}  // namespace

TEST(cache_writer_that_is_dropped) {
    for (const Codec tier : tiers) writer_that_is_dropped(tier);
}

// Whatever is done to the bytes of a shard, a reader says so or gives back what was written.
namespace {

void damage(Codec tier, bool indexed) {
    const Folder folder;
    {
        Writer writer(folder.path(), options(tier));
        for (int n = 0; n < 4; ++n) writer.write(Targets8(n).sample(key_of(0, n)));
        writer.close();
    }
    if (indexed) update_index(folder.path());
    std::string shard;
    for (const std::string& name : list_directory(folder.path()))
        if (name.ends_with(".shard")) shard = join(folder.path(), name);
    std::string content;
    {
        std::ifstream in(shard, std::ios::binary);
        content.assign(std::istreambuf_iterator<char>(in), {});
    }
    const auto rewrite = [&](const std::string& bytes) {
        std::ofstream(shard, std::ios::binary | std::ios::trunc)
            .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    };
    int told = 0;
    for (int round = 0; round < 300; ++round) {
        std::string changed = content;
        switch (random() % 3) {
            case 0:
                changed[random() % changed.size()] ^= static_cast<char>(1 << random() % 8);
                break;
            case 1:
                changed.resize(random() % changed.size());
                break;
            case 2: {
                const std::size_t at = random() % changed.size(),
                                  n = std::min<std::size_t>(random() % 512, changed.size() - at);
                for (std::size_t i = 0; i < n; ++i) changed[at + i] = static_cast<char>(random());
                break;
            }
        }
        if (changed == content) continue;
        rewrite(changed);
        try {
            const Reader reader(folder.path());
            for (int n = 0; n < 4; ++n) check_sample(reader, key_of(0, n), n);
            // One copy of a model may be damaged without a reader's notice, and what an index makes dispensable.
            if ((tier == Codec::compact || indexed) && !verify(folder.path(), 1).faults.empty()) continue;
        } catch (const Fault&) {
            ++told;
            continue;
        }
        fail(__FILE__, __LINE__, text("damage of round ", round, " was not noticed"));
    }
    CHECK(told > (tier == Codec::compact || indexed ? 100 : 200));
    rewrite(content);
    CHECK(verify(folder.path(), 1).faults.empty());
}

}  // namespace

TEST(cache_damage) {
    for (const Codec tier : tiers)
        for (const bool indexed : {false, true}) damage(tier, indexed);
}
