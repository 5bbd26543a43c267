// The two files that a writer appends to: a shard, and the journal that says how much of it can be relied upon.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache/format.h"
#include "cache/store/file.h"

namespace kdfast::cache {

class JournalFile {
  public:
    // Created, with its first record, and durable.
    JournalFile(const std::string& directory, std::uint64_t writer, std::uint32_t header_crc);
    // Durable when this returns. Number, writer and time are filled in.
    void append(Record record);

  private:
    File file_;
    std::uint64_t writer_;
    std::uint32_t number_ = 0;
    std::uint64_t time_ = 0;  // of the last record; later ones have no earlier time
};

// What a model frame holds.
using ModelPayload = std::shared_ptr<const std::vector<std::byte>>;

class ShardFile {
  public:
    // Created under its first name, its headers durable, and the journal told.
    ShardFile(std::string directory, Bytes cache_header, std::uint64_t writer, std::uint32_t ordinal,
              JournalFile& journal);

    std::uint64_t size() const { return size_; }  // bytes so far, synchronised or not
    std::uint64_t uncommitted() const { return size_ - committed_; }
    std::uint64_t samples() const { return samples_; }
    std::uint64_t committed_samples() const { return committed_samples_; }

    // Fills in the header's place, and that of its model, which is written, twice, where the shard has it not yet.
    void append(FrameHeader& header, Bytes blocks, const ModelPayload& model);
    void commit();  // everything so far is durable
    void finish();  // index, tail, final name

  private:
    void write(Bytes bytes);
    void flush();
    std::uint64_t place_of(const ModelPayload& model);
    Record record(RecordType type) const;

    std::string directory_;
    JournalFile& journal_;
    ShardHeader header_;
    File file_;
    Index index_;
    std::vector<std::pair<ModelPayload, std::uint64_t>> models_;  // with the offset of the first copy
    std::vector<std::byte> pending_;                              // small frames go to the system together
    std::uint64_t size_ = 0;
    std::uint64_t committed_ = 0;
    std::uint64_t samples_ = 0;
    std::uint64_t committed_samples_ = 0;
};

// All that one writer writes: its journal, and shard after shard.
class ShardSeries {
  public:
    struct Limits {
        std::uint64_t shard_bytes = std::uint64_t{1} << 30;    // a shard that has as many is finished
        std::uint64_t commit_bytes = std::uint64_t{64} << 20;  // as many are made durable unasked
    };
    ShardSeries(std::string directory, std::vector<std::byte> cache_header, std::uint64_t writer, Limits limits);

    // Makes journal and shard where there are none yet. `model` is that of a compact frame.
    void append(FrameHeader& header, Bytes blocks, const ModelPayload& model = nullptr);
    void commit();
    void close();                     // commits, finishes the shard, ends the journal
    std::uint64_t committed() const;  // samples that are durable

  private:
    void finish_shard();

    std::string directory_;
    std::vector<std::byte> cache_header_;
    std::uint64_t writer_;
    Limits limits_;
    std::optional<JournalFile> journal_;
    std::optional<ShardFile> shard_;
    std::uint32_t ordinal_ = 0;
    std::uint64_t finished_samples_ = 0;
};

std::uint64_t random_id();  // not 0

}  // namespace kdfast::cache
