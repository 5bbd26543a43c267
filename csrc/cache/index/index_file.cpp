#include "cache/index/index_file.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"

namespace kdfast::cache {
namespace {

// What a thread has read last, of all files: few, as whose keys come in order needs one of each, and whose keys come as
// they like needs all of them.
struct CachedPage {
    std::uint64_t file = 0;  // serial
    std::uint64_t number = 0;
    std::size_t rows = 0;
    std::array<std::byte, IndexPage::size> bytes;
};
constexpr std::size_t cached_pages = 16;

CachedPage& cached(std::uint64_t file, std::uint64_t number) {
    thread_local const std::unique_ptr<CachedPage[]> pages(new CachedPage[cached_pages]);
    return pages[(file + number) % cached_pages];
}

std::atomic<std::uint64_t> opened = 0;

}  // namespace

IndexFile::IndexFile(const std::string& path, std::uint64_t id, std::uint32_t header_crc)
    : file_(File::read(path)), serial_(++opened) {
    try {
        const std::uint64_t size = file_.size();
        if (size < IndexTail::size) throw Fault(Code::truncated, "the index has no room for its tail");
        tail_ = IndexTail::parse(file_.bytes_at(size - IndexTail::size, IndexTail::size));
        if (tail_.id != id || tail_.header_crc != header_crc)
            throw Fault(Code::mismatch, "the index is of another cache, or another's name");
        if (size < tail_.file_bytes()) throw Fault(Code::truncated, "the index is shorter than its tail says");
        if (size > tail_.file_bytes()) corrupt("the index is longer than its tail says");
        read_shards();
        std::uint64_t samples = 0;
        for (const IndexedShard& shard : shards_) samples += shard.samples;
        if (samples != tail_.rows) throw Fault(Code::mismatch, "the index has not the samples of its shards");
    } catch (Fault& fault) {
        throw fault.in(path);
    }
}

// Some at a time, so that of a hole that a tail says to be a list nothing is kept.
void IndexFile::read_shards() {
    constexpr std::uint64_t at_once = 4096;
    std::uint64_t at = tail_.pages * IndexPage::size;
    std::uint32_t crc = 0;
    for (std::uint64_t left = tail_.shards; left > 0; left -= std::min(left, at_once)) {
        const std::vector<std::byte> list = file_.bytes_at(at, std::min(left, at_once) * IndexedShard::size);
        for (std::size_t i = 0; i < list.size(); i += IndexedShard::size)
            shards_.push_back(IndexedShard::parse(Bytes(list).subspan(i, IndexedShard::size)));
        crc = crc32c(list, crc);
        at += list.size();
    }
    if (crc != tail_.shards_crc) throw Fault(Code::checksum, "the checksum of the index's shards does not match");
}

std::size_t IndexFile::read_page(std::uint64_t number, std::span<std::byte> out) const {
    try {
        file_.read_at(number * IndexPage::size, out);
        return IndexPage::check(out, tail_.id, number);
    } catch (Fault& fault) {
        throw fault.in(file_.path()).at(number * IndexPage::size);
    }
}

IndexFile::Page IndexFile::page(std::uint64_t number) const {
    CachedPage& page = cached(serial_, number);
    if (page.file != serial_ || page.number != number) {
        page.file = 0;
        page.rows = read_page(number, page.bytes);
        page.file = serial_;
        page.number = number;
    }
    return {page.bytes.data(), page.rows};
}

// What a checksum cannot tell is looked at where it is used.
IndexRow IndexFile::row(const std::byte* page, std::size_t row) const {
    try {
        const IndexRow found = IndexPage::row(Bytes(page, IndexPage::size), row);
        if (found.shard >= shards_.size()) corrupt("a row of the index is of no shard");
        const IndexedShard& shard = shards_[found.shard];
        if (found.entry.offset > shard.end || found.entry.frame_bytes > shard.end - found.entry.offset)
            corrupt("a row of the index is of a frame beyond its shard");
        return found;
    } catch (Fault& fault) {
        throw fault.in(file_.path());
    }
}

const IndexRow* IndexFile::Rows::next() {
    while (at_ == rows_) {
        if (pages_ == file_.tail_.pages) {
            if (found_ != file_.tail_.rows)
                throw Fault(Code::mismatch, "the index has not as many rows as it says").in(file_.path());
            return nullptr;
        }
        rows_ = file_.read_page(pages_++, page_);
        at_ = 0;
    }
    const IndexRow row = file_.row(page_.data(), at_++);
    if (found_++ > 0 && row.key < row_.key)
        throw Fault(Code::corrupt, "the rows of the index are in no order").in(file_.path());
    row_ = row;
    return &row_;
}

}  // namespace kdfast::cache
