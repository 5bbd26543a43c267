// Samples out of a cache, by key.
#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/rows/packed.h"
#include "cache/store/catalog.h"
#include "cache/store/model_store.h"
#include "cache/store/open_files.h"
#include "cache/store/proven.h"

namespace kdfast::cache {

// What to read, and where to.
struct ReadRequest {
    const Place* place = nullptr;
    std::int64_t first = 0;      // token
    Destination out;             // of out.tokens tokens
    const File* file = nullptr;  // the shard where it is not in the cache's directory; not the reader's
};

// The same for tokens that stay packed.
struct PackRequest {
    const Place* place = nullptr;
    std::int64_t first = 0;  // token
    std::int64_t tokens = 0;
    Packed out;
    const File* file = nullptr;
};

// Safe for many threads at once, and in a process forked from one that has it: files are opened when they are read,
// `open_files` of them at a time, and never seeked in.
class Reader {
  public:
    static constexpr std::size_t usual_open_files = 64;

    // Throws for damage that may hide keys, unless it may be appended to `damage`.
    explicit Reader(const std::string& directory, std::vector<Fault>* damage = nullptr,
                    std::size_t open_files = usual_open_files, UseIndex use = UseIndex::yes);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    const Catalog& catalog() const { return catalog_; }
    // Throws Fault missing, or duplicate.
    Place find(std::string_view key) const;
    // What the fields of a sample are, from its verified header.
    FrameHeader header(const Place& place) const;
    FrameHeader header(const File& file, const Place& place) const;  // its shard lies elsewhere
    void read(const ReadRequest& request) const;
    // Sorted by where they lie, on up to `threads` threads.
    void read(std::vector<ReadRequest> requests, int threads) const;
    // Of samples of the fixed codec.
    void pack(const PackRequest& request) const;
    void pack(std::vector<PackRequest> requests, int threads) const;
    // Every value of a sample, block by block: throws what a read of it all would. `elsewhere` as in a request.
    void verify(const Place& place, const File* elsewhere = nullptr) const;

  private:
    struct Part;
    using Parts = std::span<const Part>;
    // use(parts) for the blocks of a frame that hold some of the tokens, once their checksums have been verified: as
    // many at a time as are decoded together.
    template <class Use>
    void blocks(const File& shard, const FrameHeader& h, std::int64_t first, std::int64_t count, Use use) const;
    // use(reader, file, place), with the file of the place's shard or, where a repair has copied it, of another's.
    template <class Use>
    void with_file(const Place& place, Use use) const;
    // Requests of one frame's blocks.
    void decode(const Place& place, const File& shard, const FrameHeader& h, const Layout& layout,
                std::span<const DecodeRequest> requests) const;
    template <class Out>
    void read_parts(const Place& place, const File& shard, const FrameHeader& h, Parts parts, Out out) const;
    void prove(const Place& place, const File& shard, const FrameHeader& h, Parts parts) const;
    const Reader& successor() const;
    Place place_of(const Catalog& earlier, const Place& place, Fault& fault) const;

    Catalog catalog_;
    OpenFiles files_;
    ModelStore models_;
    Proven proven_;
    mutable std::atomic<const Reader*> successor_ = nullptr;  // opened when a shard was found to be gone
};

}  // namespace kdfast::cache
