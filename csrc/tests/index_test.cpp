// The index of a directory: hashes on every ISA, and what is found by it against what the shards say.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <thread>

#include "cache/index/check.h"
#include "cache/index/key_hash.h"
#include "cache/index/parts.h"
#include "cache/index/update.h"
#include "cache/store/maintenance.h"
#include "cache_case.h"
#include "isas.h"

using namespace kdfast;
using namespace kdfast::test;

TEST(index_hashes_of_keys) {
    // From another implementation of RFC 7693.
    std::string bytes;
    for (int b = 1; b < 256; ++b) bytes += static_cast<char>(b);
    CHECK((key_hash("") == KeyHash{0x40BDEFD94169E6CA, 0x7076A68E75884D4E}));
    CHECK((key_hash("abc") == KeyHash{0x2B8D2BC691B74ACF, 0x1678287502C90921}));
    CHECK((key_hash(std::string(128, 'k')) == KeyHash{0x6DC2F64C29783ADC, 0x4A599B1CBAC8D92A}));
    CHECK((key_hash(std::string(129, 'k')) == KeyHash{0x72E8F5B6C85887E4, 0xCD244D1D78B23726}));
    CHECK((key_hash(std::string(4096, 'k')) == KeyHash{0xA9230A0220706256, 0x37791ECEF5C6C09D}));
    CHECK((key_hash(bytes) == KeyHash{0x06742475B1BBB110, 0xA4072986D8BA2B9C}));

    std::vector<std::string> keys;
    for (std::size_t length = 0; length < 300; ++length) {
        std::string& key = keys.emplace_back(length, ' ');
        for (char& c : key) c = static_cast<char>(random());
    }
    std::shuffle(keys.begin(), keys.end(), random);
    const std::vector<std::string_view> views(keys.begin(), keys.end());
    for_each_isa([&] {
        for (const std::size_t count :
             {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{64}, views.size()}) {
            std::vector<KeyHash> hashes(count);
            key_hashes(std::span(views).first(count), hashes);
            for (std::size_t i = 0; i < count; ++i) CHECK(hashes[i] == key_hash(keys[i]));
        }
    });
}

namespace {

std::vector<std::string> index_files(const std::string& folder) {
    std::vector<std::string> names;
    for (const std::string& name : list_directory(folder))
        if (index_id(name)) names.push_back(name);
    return names;
}

std::vector<std::string> keys_of(const Catalog& catalog) {
    std::vector<std::string> keys;
    Catalog::Keys all(catalog);
    while (std::optional<std::string> key = all.next()) keys.push_back(*std::move(key));
    return keys;
}

// That a catalogue with the index says what one without it does.
void check_same(const std::string& folder, const std::vector<std::string>& others) {
    const Catalog indexed(folder), plain(folder, nullptr, UseIndex::no);
    CHECK_EQUAL(indexed.size(), plain.size());
    const std::vector<std::string> keys = keys_of(plain);
    CHECK(keys_of(indexed) == keys);
    for (const std::string& key : keys) {
        const std::optional<Place> a = indexed.find(key), b = plain.find(key);
        CHECK(a && b && a->entry == b->entry && a->shard == b->shard && a->key == key);
    }
    for (const std::string& key : others) CHECK(!indexed.find(key));
    std::vector<std::string_view> asked(keys.begin(), keys.end());
    asked.insert(asked.end(), others.begin(), others.end());
    const std::vector<bool> have = indexed.have(asked);
    for (std::size_t i = 0; i < asked.size(); ++i) CHECK_EQUAL(have[i], i < keys.size());
    CHECK(check_index(folder).empty());
}

// Writers one after the other, of 1 to 40 samples, some of which others had written before or at the same time.
void grow(const std::string& folder, int rounds, IndexLimits limits, Random& random) {
    int next = 0;
    for (int round = 0; round < rounds; ++round) {
        Writer one(folder, options(Codec::fixed)), two(folder, options(Codec::fixed));
        const int count = static_cast<int>(1 + random() % 40);
        for (int i = 0; i < count; ++i, ++next) {
            one.write(Targets8(next).sample(key_of(0, next)));
            if (random() % 4 == 0) two.write(Targets8(next).sample(key_of(0, next)));
            if (next > 0) {
                const int before = static_cast<int>(random() % static_cast<unsigned>(next));
                two.write(Targets8(before).sample(key_of(0, before)));
            }
        }
        two.close();
        if (random() % 2 == 0) update_index(folder, limits);
        one.close();
        update_index(folder, limits);
    }
}

}  // namespace

TEST(index_as_the_shards) {
    for (const IndexLimits limits : {IndexLimits{}, IndexLimits{.rows_in_memory = 3, .files_at_once = 2}}) {
        const Folder folder;
        grow(folder.path(), 12, limits, random);
        CHECK(index_files(folder.path()).size() <= 4);
        for (const std::string& name : list_directory(folder.path())) CHECK(!name.ends_with(".temporary"));
        check_same(folder.path(), {"no such key", std::string(4096, 'x')});
        CHECK(verify(folder.path(), 1).faults.empty());
        const Catalog catalog(folder.path());
        CHECK_EQUAL(catalog.indexed_shards(), catalog.shards().size());
        CHECK_EQUAL(catalog.listing().size(), std::size_t{0});

        // Shards that are not in it yet, of which one is not finished.
        Writer more(folder.path(), options(Codec::fixed));
        for (int n = 0; n < 30; ++n) more.write(Targets8(n).sample(key_of(1, n)));
        more.commit();
        check_same(folder.path(), {key_of(1, 30)});
        more.close();
        check_same(folder.path(), {key_of(1, 30)});
    }
}

// A page that is damaged while threads read by it: every answer stays right, and the next index is made anew.
TEST(index_damaged_under_readers) {
    const Folder folder;
    grow(folder.path(), 6, {}, random);
    const std::vector<std::string> keys = keys_of(Catalog(folder.path()));
    const Catalog catalog(folder.path());
    for (const std::string& name : index_files(folder.path())) {
        const std::string path = join(folder.path(), name);
        std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
        for (std::uint64_t at = 100; at < *file_size(path) - IndexTail::size; at += IndexPage::size) {
            file.seekp(static_cast<std::streamoff>(at));
            file.put('!');
        }
    }
    std::vector<std::thread> threads;
    std::vector<int> found(4), missed(4);
    for (std::size_t t = 0; t < found.size(); ++t)
        threads.emplace_back([&, t] {
            for (const std::string& key : keys) {
                const std::optional<Place> place = catalog.find(key);
                found[t] += place && place->key == key;
                missed[t] += !catalog.find(key + "?");
            }
        });
    for (std::thread& thread : threads) thread.join();
    for (std::size_t t = 0; t < found.size(); ++t) {
        CHECK_EQUAL(static_cast<std::size_t>(found[t]), keys.size());
        CHECK_EQUAL(static_cast<std::size_t>(missed[t]), keys.size());
    }
    CHECK(keys_of(catalog) == keys);
    CHECK(!verify(folder.path(), 1).faults.empty());
    {
        Writer writer(folder.path(), options(Codec::fixed));  // of many more samples, so that all files are merged
        for (int n = 0; n < 200; ++n) writer.write(Targets8(n).sample(key_of(2, n)));
        writer.close();
    }
    update_index(folder.path());
    CHECK(verify(folder.path(), 1).faults.empty());
    check_same(folder.path(), {});
}
