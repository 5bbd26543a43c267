#include "cache/store/shard.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"
#include "cache/store/model_frame.h"

namespace kdfast::cache {
namespace {

constexpr std::size_t write_bytes = std::size_t{1} << 20;

}  // namespace

std::uint64_t random_id() {
    std::random_device source;
    std::uint64_t id = 0;
    while (id == 0) id = std::uint64_t{source()} << 32 | source();
    return id;
}

JournalFile::JournalFile(const std::string& directory, std::uint64_t writer, std::uint32_t header_crc)
    : file_(File::create(join(directory, journal_name(writer)))), writer_(writer) {
    if (!file_.lock()) throw Fault(Code::system, "another process has locked a journal that is new").in(file_.path());
    sync_directory(directory);
    append({.type = RecordType::begin, .shard_id = header_crc});
}

void JournalFile::append(Record record) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    time_ = std::max(time_, static_cast<std::uint64_t>(std::chrono::nanoseconds(now).count()));
    record.writer = writer_;
    record.number = number_++;
    record.time = time_;
    file_.append(record.to_bytes());
    file_.sync_data();
}

ShardFile::ShardFile(std::string directory, Bytes cache_header, std::uint64_t writer, std::uint32_t ordinal,
                     JournalFile& journal)
    : directory_(std::move(directory)),
      journal_(journal),
      header_{.shard_id = random_id(), .writer = writer, .ordinal = ordinal},
      file_(File::create(join(directory_, shard_name(writer, ordinal, false)))) {
    write(cache_header);
    write(header_.bytes());
    flush();
    file_.sync_data();
    sync_directory(directory_);
    journal_.append(record(RecordType::open));
    committed_ = size_;
}

Record ShardFile::record(RecordType type) const {
    return {
        .type = type, .ordinal = header_.ordinal, .shard_id = header_.shard_id, .bytes = size_, .samples = samples_};
}

void ShardFile::write(Bytes bytes) {
    if (pending_.size() + bytes.size() > write_bytes) flush();
    if (bytes.size() >= write_bytes) {
        file_.append(bytes);
    } else {
        cache::append(pending_, bytes);
    }
    size_ += bytes.size();
}

void ShardFile::flush() {
    file_.append(pending_);
    pending_.clear();
}

std::uint64_t ShardFile::place_of(const ModelPayload& model) {
    for (const auto& [known, place] : models_)
        if (known == model || *known == *model) return place;
    ModelHeader header{.payload_bytes = static_cast<std::uint32_t>(model->size()),
                       .payload_crc = crc32c(*model),
                       .offset = size_,
                       .shard_id = header_.shard_id,
                       .first_copy = size_};
    for (int copy = 0; copy < 2; ++copy) {
        header.offset = size_;
        write(header.bytes());
        write(*model);
        write(std::vector<std::byte>(header.frame_bytes() - header.size - model->size()));
        index_.add(header.entry(), {});
    }
    models_.emplace_back(model, header.first_copy);
    return header.first_copy;
}

void ShardFile::append(FrameHeader& header, Bytes blocks, const ModelPayload& model) {
    header.model = model ? place_of(model) : 0;
    header.offset = size_;
    header.shard_id = header_.shard_id;
    const std::vector<std::byte> bytes = header.bytes();
    if (size_ + header.frame_bytes() > most_shard_bytes) throw Fault(Code::system, "a shard is full").in(file_.path());
    write(bytes);
    write(blocks);
    index_.add(header.entry(), header.key);
    ++samples_;
}

void ShardFile::commit() {
    if (uncommitted() == 0) return;
    flush();
    file_.sync_data();
    journal_.append(record(RecordType::commit));
    committed_ = size_;
    committed_samples_ = samples_;
}

void ShardFile::finish() {
    const std::uint64_t index_offset = size_;
    const std::vector<std::byte> index = index_.bytes(header_.shard_id);
    write(index);
    write(Tail{.shard_id = header_.shard_id, .index_offset = index_offset, .index_bytes = index.size()}.bytes());
    flush();
    file_.sync_data();
    file_.close();
    rename_file(file_.path(), join(directory_, shard_name(header_.writer, header_.ordinal, true)));
    sync_directory(directory_);
    journal_.append(record(RecordType::finish));
    committed_ = size_;
    committed_samples_ = samples_;
}

ShardSeries::ShardSeries(std::string directory, std::vector<std::byte> cache_header, std::uint64_t writer,
                         Limits limits)
    : directory_(std::move(directory)), cache_header_(std::move(cache_header)), writer_(writer), limits_(limits) {}

void ShardSeries::append(FrameHeader& header, Bytes blocks, const ModelPayload& model) {
    if (!journal_) journal_.emplace(directory_, writer_, load<std::uint32_t>(cache_header_, cache_header_.size() - 4));
    if (!shard_) shard_.emplace(directory_, cache_header_, writer_, ordinal_++, *journal_);
    shard_->append(header, blocks, model);
    if (shard_->size() >= limits_.shard_bytes) {
        finish_shard();
    } else if (shard_->uncommitted() >= limits_.commit_bytes) {
        shard_->commit();
    }
}

void ShardSeries::commit() {
    if (shard_) shard_->commit();
}

void ShardSeries::finish_shard() {
    if (!shard_) return;
    shard_->finish();
    finished_samples_ += shard_->samples();
    shard_.reset();
}

void ShardSeries::close() {
    finish_shard();
    if (journal_) journal_->append({.type = RecordType::close, .samples = finished_samples_});
    journal_.reset();  // whose lock would say that the writer is alive
}

std::uint64_t ShardSeries::committed() const { return finished_samples_ + (shard_ ? shard_->committed_samples() : 0); }

}  // namespace kdfast::cache
