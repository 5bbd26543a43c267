// Samples into a cache: copied, encoded by workers, and appended in order by one more thread, so that who writes waits
// only where a bounded queue is full.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cache/compact/tier.h"
#include "cache/store/catalog.h"
#include "cache/store/reader.h"
#include "cache/store/shard.h"

namespace kdfast::cache {

struct WriterOptions {
    CacheHeader header;
    Codec tier = Codec::fixed;    // of topk and topp
    std::uint8_t grid = 4;        // of log-probabilities: steps of 2^-grid nats
    std::uint8_t drawn_grid = 8;  // of the masses of pps
    std::uint16_t block_tokens = 128;
    ShardSeries::Limits limits;
    bool keep_duplicates = false;  // of a key with equal token ids the first, without comparing their targets
    std::uint64_t queue_bytes = std::uint64_t{256} << 20;  // of samples that wait
    int threads = 1;                                       // that encode
};

struct Sample {
    std::string key;
    Method method = Method::topk;
    std::uint32_t kept = 0;
    double parameter = 0;  // as in the frame
    std::optional<std::uint64_t> seed;
    std::optional<TokenHash> token_hash;
    Source targets;
};

class Writer {
  public:
    // Makes the cache where there is none; throws Fault mismatch where there is another.
    Writer(std::string directory, WriterOptions options);
    ~Writer();  // what was not committed is lost
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;

    // Whether the sample is new: one that is there already, with equal token ids and targets, is left as it is; one
    // with others is Fault duplicate. Copies what it is given, of which it throws ArgumentError where the format cannot
    // hold it, and nothing else is lost. Every call throws the first error of the threads behind it.
    bool write(const Sample& sample);
    bool has(std::string_view key) const;
    // For each key whether there is a sample of it, or one on its way.
    std::vector<bool> have(std::span<const std::string_view> keys) const;
    std::uint64_t commit();  // samples of this writer that are durable now, which are all that were written
    std::uint64_t close();   // commits, finishes the shard, ends the journal; samples as commit
    std::uint64_t id() const { return writer_; }
    std::uint64_t waiting_bytes() const;
    // What hides keys of the cache, which are then missing, and may be written again.
    const std::vector<Fault>& damage() const { return damage_; }

  private:
    struct Job;
    // A key that was written, or met in what others had stored.
    struct Known {
        std::optional<TokenHash> hash;
        bool stored = false;        // by another writer
        std::uint64_t content = 0;  // names the targets, once this writer has encoded them
    };
    void check_process() const;
    void check_usable();
    bool is_same(Job& job);
    void submit(std::unique_lock<std::mutex>& lock, std::shared_ptr<Job> job);
    void wait_for(const std::shared_ptr<Job>& job);
    void encode_jobs();
    void write_jobs();
    void carry_out(Job& job);
    void stop();
    void fail(std::exception_ptr error);

    const std::string directory_;
    const WriterOptions options_;
    const std::uint64_t writer_;
    const long process_;
    std::vector<std::byte> header_bytes_;
    std::vector<Fault> damage_;
    std::unique_ptr<const Catalog> there_;  // what was committed when this one was opened
    std::unordered_map<std::string, Known> known_;

    // Of the thread that appends.
    ShardSeries series_;
    CompactTier compact_;

    // In a process forked from this one they have waiters that are not there, and to destroy them waits for ever.
    struct Signals {
        std::mutex mutex;
        std::mutex comparing;  // guards stored_
        std::condition_variable work, room, done;
    };
    std::unique_ptr<Signals> signals_ = std::make_unique<Signals>();
    std::deque<std::shared_ptr<Job>> encoding_;  // not taken by a worker yet
    std::deque<std::shared_ptr<Job>> order_;     // as they were written, until appended
    std::uint64_t waiting_ = 0;                  // bytes
    std::uint64_t committed_ = 0;                // samples
    bool stopping_ = false;
    bool closing_ = false;  // nothing may be written any more
    bool closed_ = false;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
    std::unique_ptr<const Reader> stored_;  // what was committed when a sample was last looked up to be compared
};

}  // namespace kdfast::cache
