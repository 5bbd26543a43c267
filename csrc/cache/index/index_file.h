// One file of a directory's index, open: rows by key, a page at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/index/parts.h"
#include "cache/store/file.h"

namespace kdfast::cache {

// Safe for many threads, and in a process forked from one that has it: pages that were read are each thread's own.
class IndexFile {
  public:
    // Reads the tail and the shards; throws Fault where they are not what they should be.
    IndexFile(const std::string& path, std::uint64_t id, std::uint32_t header_crc);

    const IndexTail& tail() const { return tail_; }
    const std::vector<IndexedShard>& shards() const { return shards_; }
    const std::string& path() const { return file_.path(); }

    // use(row) for each frame of a key. Throws Fault for a page that is damaged.
    template <class Use>
    void find(const KeyHash& key, Use use) const {
        for (std::uint64_t number = bucket_of(key, tail_.buckets); number < tail_.pages; ++number) {
            const Page page = this->page(number);
            std::size_t row = 0, last = page.rows;
            while (row < last) {
                const std::size_t middle = (row + last) / 2;
                if (IndexPage::key(page.bytes, middle) < key)
                    row = middle + 1;
                else
                    last = middle;
            }
            for (; row < page.rows && IndexPage::key(page.bytes, row) == key; ++row) use(this->row(page.bytes, row));
            if (row < page.rows || page.rows < IndexPage::rows) return;
        }
    }
    bool has(const KeyHash& key) const {
        bool found = false;
        find(key, [&](const IndexRow&) { found = true; });
        return found;
    }

    // use(row) for every row, in the order of the keys; throws Fault where they have no order, or are not as many as
    // the tail says.
    template <class Use>
    void for_each(Use use) const {
        Rows rows(*this);
        while (const IndexRow* row = rows.next()) use(*row);
    }

    // The same, one at a time.
    class Rows {
      public:
        explicit Rows(const IndexFile& file) : file_(file), page_(IndexPage::size) {}
        const IndexRow* next();  // null behind the last

      private:
        const IndexFile& file_;
        std::vector<std::byte> page_;
        IndexRow row_;
        std::uint64_t pages_ = 0, found_ = 0;  // so far
        std::size_t at_ = 0, rows_ = 0;        // in the page
    };

  private:
    struct Page {
        const std::byte* bytes;  // until this thread reads another
        std::size_t rows;
    };
    void read_shards();
    Page page(std::uint64_t number) const;
    std::size_t read_page(std::uint64_t number, std::span<std::byte> out) const;  // how many rows it has
    IndexRow row(const std::byte* page, std::size_t row) const;

    File file_;
    IndexTail tail_;
    std::vector<IndexedShard> shards_;
    std::uint64_t serial_;  // among all that this process has opened
};

}  // namespace kdfast::cache
