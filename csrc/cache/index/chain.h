// The files that make up a directory's index, and of which shards they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cache/index/index_file.h"
#include "cache/store/directory.h"

namespace kdfast::cache {

// Whether what was met in an index is no reason to fail, as the shards say the same. On a network file system a file
// that another machine has removed since, for one that it is merged into, is a stale handle.
bool is_dispensable(const Fault& fault);

class IndexChain {
  public:
    IndexChain() = default;  // of no index
    // The newest file there and those that it builds on; none where one of them is not what it should be. What the
    // system refuses is thrown.
    // `damage` is told of every file that is not.
    IndexChain(const std::string& directory, std::uint32_t header_crc, std::vector<Fault>* damage = nullptr);

    // Marks the shards that it has as indexed. Where the journals do not say the same of one of them, or its file is
    // not there, it is of an older state, and left empty.
    void join(Directory& directory, std::vector<Fault>* damage = nullptr);

    struct Part {
        std::unique_ptr<const IndexFile> file;
        std::vector<std::uint32_t> shards;  // numbers in the directory, once joined
    };
    // Leaves it empty.
    void forget() { parts_.clear(); }
    // The newest first.
    const std::vector<Part>& parts() const { return parts_; }
    std::vector<Part>& parts() { return parts_; }
    bool empty() const { return parts_.empty(); }
    std::uint64_t keys() const;
    std::uint64_t rows() const;
    std::uint64_t generation() const { return generation_; }  // of the newest file there, used or not

    // use(entry, shard's number in the directory) for each frame of a key.
    template <class Use>
    void find(const KeyHash& key, Use use) const {
        for (const Part& part : parts_)
            part.file->find(key, [&](const IndexRow& row) { use(row.entry, part.shards[row.shard]); });
    }

    bool has(const KeyHash& key) const {
        return std::ranges::any_of(parts_, [&](const Part& part) { return part.file->has(key); });
    }

  private:
    void read(const std::string& directory, std::uint32_t header_crc, std::vector<Fault>& damage, bool& gone);

    std::vector<Part> parts_;
    std::uint64_t generation_ = 0;
};

}  // namespace kdfast::cache
