#include "cache/store/writer.h"

#include <unistd.h>

#include <algorithm>
#include <span>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"
#include "cache/store/compare.h"
#include "core/error.h"

namespace kdfast::cache {
namespace {

enum class Task : std::uint8_t { sample, commit, close };

std::string differs(const CacheHeader& there, const CacheHeader& wanted) {
    const auto listed = [](const std::vector<double>& values) {
        std::string out;
        for (const double v : values) out += (out.empty() ? "" : ", ") + std::to_string(v);
        return out;
    };
    const auto say = [](const char* what, const std::string& a, const std::string& b) {
        return std::string("the cache there has ") + what + " " + a + ", this writer " + b;
    };
    if (there.vocab_size != wanted.vocab_size)
        return say("vocab_size", std::to_string(there.vocab_size), std::to_string(wanted.vocab_size));
    if (there.temperatures != wanted.temperatures)
        return say("temperatures", listed(there.temperatures), listed(wanted.temperatures));
    if (there.shift != wanted.shift) return say("shift", std::to_string(there.shift), std::to_string(wanted.shift));
    return say("metadata", there.metadata, wanted.metadata);
}

template <class T>
std::vector<T> copy(const T* from, std::int64_t count) {
    return from ? std::vector<T>(from, from + count) : std::vector<T>();
}

}  // namespace

// A sample on its way, or a request to the thread that appends.
struct Writer::Job {
    Task task = Task::sample;
    std::uint64_t bytes = 0;  // in the queue
    bool done = false;

    FrameHeader header;
    Layout layout;
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> logprobs, mass, lse, gold, neg_entropy;
    std::int64_t tokens = 0;

    bool encoded = false;
    std::exception_ptr error;       // of encoding
    std::vector<std::byte> blocks;  // of the compact tier without a model: fixed ones
    std::uint64_t content = 0;      // names the targets, not 0
    std::shared_ptr<const CompactModel> model;

    Job(const Sample& s, const WriterOptions& options);
    explicit Job(Task t) : task(t), encoded(true) {}
    Source source() const;
    void make_blocks();  // of the compact tier fixed ones
    std::uint64_t content_of() const;
    void encode(std::shared_ptr<const CompactModel> with);
};

Writer::Job::Job(const Sample& s, const WriterOptions& options) : tokens(s.targets.tokens) {
    const Source& t = s.targets;
    if (tokens < 0 || tokens > most_tokens)
        throw ArgumentError("a sample may have at most " + std::to_string(most_tokens) + " tokens, got " +
                            std::to_string(tokens));
    if (s.kept < 1 || s.kept > most_kept || static_cast<std::uint64_t>(tokens) * s.kept > most_entries)
        throw ArgumentError("K must be 1 to 65535, and tokens x K at most 2**28, got " + std::to_string(tokens) +
                            " x " + std::to_string(s.kept));
    const bool drawn = s.method == Method::sample || s.method == Method::pps;
    if (drawn && options.header.temperatures.size() != 1)
        throw ArgumentError("drawn targets go into a cache of one temperature, that at which they were drawn");
    header.key = s.key;
    header.seed = s.seed.value_or(0);
    header.parameter = s.parameter;
    header.token_hash = s.token_hash.value_or(TokenHash{});
    header.tokens = static_cast<std::uint32_t>(tokens);
    header.kept = static_cast<std::uint16_t>(s.kept);
    header.block_tokens = options.block_tokens;
    header.codec = drawn ? Codec::drawn : options.tier;
    header.method = s.method;
    header.grid = drawn ? options.drawn_grid : options.grid;
    const auto kept = static_cast<std::int32_t>(s.kept);
    const bool ragged = t.k_eff && std::any_of(t.k_eff, t.k_eff + tokens, [&](std::int32_t k) { return k != kept; });
    header.flags = static_cast<std::uint8_t>((ragged ? flag::ragged : 0) | (t.gold ? flag::gold : 0) |
                                             (s.token_hash ? flag::hashed : 0) | (s.seed ? flag::seeded : 0));
    layout = header.layout(options.header);

    ids = copy(t.ids, tokens * kept);
    logprobs = copy(drawn ? nullptr : t.logprobs, tokens * kept);
    mass = copy(drawn ? t.mass : nullptr, tokens * kept);
    k_eff = copy(ragged ? t.k_eff : nullptr, tokens);
    gold = copy(t.gold, tokens);
    neg_entropy = copy(drawn ? t.neg_entropy : nullptr, tokens);
    for (std::size_t i = 0; i < layout.temperatures.size(); ++i) {
        const float* row = t.lse + static_cast<std::int64_t>(i) * t.lse_stride;
        lse.insert(lse.end(), row, row + tokens);
    }
    bytes = 4 * (ids.size() + k_eff.size() + logprobs.size() + mass.size() + lse.size() + gold.size() +
                 neg_entropy.size()) +
            s.key.size() + sizeof(Job);
    try {
        check(layout, source());
    } catch (const ArgumentError& fault) {
        throw ArgumentError("sample " + header.key + ", " + fault.what());
    }
}

Source Writer::Job::source() const {
    const auto data = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
    return {.tokens = tokens,
            .ids = data(ids),
            .logprobs = data(logprobs),
            .mass = data(mass),
            .lse = data(lse),
            .lse_stride = tokens,
            .k_eff = data(k_eff),
            .gold = data(gold),
            .neg_entropy = data(neg_entropy)};
}

void Writer::Job::make_blocks() {
    const Source all = source();
    Layout first_layout = layout;
    if (layout.codec == Codec::compact) first_layout.codec = Codec::fixed;
    for (std::int64_t first = 0; first < tokens; first += header.block_tokens) {
        const std::int64_t count = std::min<std::int64_t>(header.block_tokens, tokens - first);
        const std::size_t before = blocks.size();
        cache::encode(first_layout, all.rows(first, count, header.kept), blocks);
        const Bytes block = Bytes(blocks).subspan(before);
        header.blocks.push_back({static_cast<std::uint32_t>(block.size()), crc32c(block)});
    }
    content = content_of();
    if (content == 0) content = 1;
}

// Names the targets by what has been made of them, but for how wide the rows were that they came in.
std::uint64_t Writer::Job::content_of() const {
    std::uint64_t name = static_cast<std::uint64_t>(header.method) << 1 | (header.flags & flag::gold ? 1 : 0);
    const auto add = [&](std::uint64_t part) { name = (name ^ part ^ name >> 29) * 0x9E3779B97F4A7C15u; };
    std::size_t at = 0;
    for (std::size_t b = 0; b < header.blocks.size(); ++b) {
        const std::size_t count = header.tokens_of(b);
        Bytes block = Bytes(blocks).subspan(at, header.blocks[b].bytes);
        at += block.size();
        if (header.codec == Codec::drawn) {
            add(std::uint64_t{header.blocks[b].crc} << 32 | block.size());
            add(header.kept);
            continue;
        }
        // Of a fixed block what comes before k_eff, k_eff, and what comes behind, without the zeros at its end.
        const std::size_t before = 4 * count * (1 + layout.temperatures.size() + (layout.gold ? 1 : 0));
        const std::vector<std::uint16_t> full(layout.ragged ? 0 : count, header.kept);
        const Bytes widths = layout.ragged ? block.subspan(before, 2 * count) : std::as_bytes(std::span(full));
        add(std::uint64_t{crc32c(block.first(before))} << 32 | crc32c(widths));
        block = block.subspan(before + (layout.ragged ? 2 * count : 0));
        while (!block.empty() && block.back() == std::byte{0}) block = block.first(block.size() - 1);
        add(std::uint64_t{crc32c(block)} << 32 | block.size());
    }
    return name;
}

void Writer::Job::encode(std::shared_ptr<const CompactModel> with) {
    make_blocks();
    if (layout.codec == Codec::compact && with) {
        make_compact(*with, layout, header, blocks);
        model = std::move(with);
    }
    for (auto* values : {&logprobs, &mass, &lse, &gold, &neg_entropy}) std::vector<float>().swap(*values);
    for (auto* values : {&ids, &k_eff}) std::vector<std::int32_t>().swap(*values);
}

Writer::Writer(std::string directory, WriterOptions options)
    : directory_(std::move(directory)),
      options_(std::move(options)),
      writer_(random_id()),
      process_(static_cast<long>(::getpid())),
      header_bytes_(options_.header.bytes()),
      series_(directory_, header_bytes_, writer_, options_.limits),
      compact_(options_.header, options_.limits.shard_bytes, series_) {
    if (options_.tier != Codec::fixed && options_.tier != Codec::compact)
        throw ArgumentError("tier must be fixed or compact");
    if (options_.grid < least_grid || options_.grid > most_grid)
        throw ArgumentError("grid must be 2 to 10, got " + std::to_string(options_.grid));
    if (!is_block_tokens(options_.block_tokens))
        throw ArgumentError("block_tokens must be 64, 128 or 256, got " + std::to_string(options_.block_tokens));
    if (options_.threads < 1) throw ArgumentError("threads must be at least 1");
    make_directories(directory_);
    if (!exists(join(directory_, "cache.header"))) {
        char temporary[40];
        std::snprintf(temporary, sizeof temporary, "%016llx.temporary", static_cast<unsigned long long>(writer_));
        publish(directory_, "cache.header", header_bytes_, temporary);
    }
    there_ = std::make_unique<const Catalog>(directory_, &damage_);
    if (there_->header_bytes() != header_bytes_)
        throw Fault(Code::mismatch, differs(there_->header(), options_.header)).in(directory_);
    try {
        for (int i = 0; i < options_.threads; ++i) threads_.emplace_back([this] { encode_jobs(); });
        threads_.emplace_back([this] { write_jobs(); });
    } catch (...) {
        stop();
        throw;
    }
}

Writer::~Writer() {
    if (process_ != static_cast<long>(::getpid())) {
        // The threads stayed behind in the process that forked; to join them would wait for ever.
        for (std::thread& t : threads_) t.detach();
        static_cast<void>(signals_.release());
        return;
    }
    stop();
}

void Writer::stop() {
    {
        std::lock_guard lock(signals_->mutex);
        stopping_ = true;
    }
    signals_->work.notify_all();
    signals_->done.notify_all();
    for (std::thread& t : threads_) t.join();
    threads_.clear();
}

void Writer::fail(std::exception_ptr error) {
    {
        std::lock_guard lock(signals_->mutex);
        if (!error_) error_ = std::move(error);
    }
    signals_->work.notify_all();
    signals_->room.notify_all();
    signals_->done.notify_all();
}

// Before the lock is taken: at the fork a thread that stayed behind may have held it, and here it is held for ever.
void Writer::check_process() const {
    if (process_ != static_cast<long>(::getpid()))
        throw ArgumentError("a writer cannot be used in a process forked from the one that opened it: open another");
}

// With the lock held.
void Writer::check_usable() {
    if (error_) std::rethrow_exception(error_);
    if (closing_) throw ArgumentError("the writer is closed");
}

bool Writer::has(std::string_view key) const {
    check_process();
    {
        std::lock_guard lock(signals_->mutex);
        if (known_.contains(std::string(key))) return true;
    }
    return there_->first(key).has_value();
}

std::vector<bool> Writer::have(std::span<const std::string_view> keys) const {
    check_process();
    std::vector<bool> have = there_->have(keys);
    std::lock_guard lock(signals_->mutex);
    for (std::size_t i = 0; i < keys.size() && !known_.empty(); ++i)
        if (!have[i]) have[i] = known_.contains(std::string(keys[i]));
    return have;
}

std::uint64_t Writer::waiting_bytes() const {
    check_process();
    std::lock_guard lock(signals_->mutex);
    return waiting_;
}

bool Writer::write(const Sample& sample) {
    check_process();
    check_key(sample.key);
    {
        std::lock_guard lock(signals_->mutex);
        check_usable();
    }
    auto job = std::make_shared<Job>(sample, options_);  // before the key is known, as it may be refused
    const std::optional<Place> there = there_->first(sample.key);
    {
        std::unique_lock lock(signals_->mutex);
        Known known{.hash = sample.token_hash};
        if (there) {
            known.hash.reset();
            if (there->entry.flags & flag::hashed) known.hash = there->entry.token_hash;
            known.stored = true;
        }
        const auto [found, is_new] = known_.try_emplace(sample.key, known);
        const bool fresh = is_new && !there;
        if (!fresh) {
            const std::optional<TokenHash> hash = found->second.hash;
            lock.unlock();
            const auto refuse = [&](const char* why) {
                throw Fault(Code::duplicate, why).in(directory_).of(sample.key);
            };
            if (!hash || !sample.token_hash)
                refuse("the key is there, and without token_ids of both its samples cannot be compared");
            if (*hash != *sample.token_hash) refuse("the key is there with other token ids");
            if (!options_.keep_duplicates && !is_same(*job))
                refuse(
                    "the key is there with the same token ids and other targets; a writer with on_duplicate=\"keep\" "
                    "leaves the first");
            return false;
        }
    }
    try {
        std::unique_lock lock(signals_->mutex);
        submit(lock, std::move(job));
    } catch (...) {
        {
            std::lock_guard lock(signals_->mutex);
            known_.erase(sample.key);
        }
        signals_->done.notify_all();
        throw;
    }
    return true;
}

// Whether the targets are those that the key has, whoever wrote them.
bool Writer::is_same(Job& job) {
    job.make_blocks();
    const std::string& key = job.header.key;
    {
        std::unique_lock lock(signals_->mutex);
        const auto known = [&] { return known_.find(key); };
        signals_->done.wait(lock, [&] {
            return error_ || known() == known_.end() || known()->second.stored || known()->second.content != 0;
        });
        check_usable();
        if (known() != known_.end() && known()->second.content == job.content) return true;
    }
    const std::lock_guard one_at_a_time(signals_->comparing);
    if (!stored_ || !stored_->catalog().find(key)) {
        commit();
        std::vector<Fault> damage;
        stored_ = std::make_unique<const Reader>(directory_, &damage);
    }
    if (!same_targets(*stored_, stored_->find(key), job.layout, job.source())) return false;
    std::lock_guard lock(signals_->mutex);
    known_.at(key).content = job.content;  // which is soon compared, when it comes again
    return true;
}

void Writer::submit(std::unique_lock<std::mutex>& lock, std::shared_ptr<Job> job) {
    signals_->room.wait(lock, [&] { return error_ || waiting_ == 0 || waiting_ + job->bytes <= options_.queue_bytes; });
    check_usable();
    if (job->task == Task::close) closing_ = true;
    waiting_ += job->bytes;
    if (!job->encoded) encoding_.push_back(job);
    order_.push_back(std::move(job));
    signals_->work.notify_all();
}

void Writer::wait_for(const std::shared_ptr<Job>& job) {
    std::unique_lock lock(signals_->mutex);
    submit(lock, job);
    signals_->done.wait(lock, [&] { return error_ || job->done; });
    if (!job->done) std::rethrow_exception(error_);
}

std::uint64_t Writer::commit() {
    check_process();
    {
        std::lock_guard lock(signals_->mutex);
        check_usable();
    }
    wait_for(std::make_shared<Job>(Task::commit));
    std::lock_guard lock(signals_->mutex);
    return committed_;
}

std::uint64_t Writer::close() {
    check_process();
    {
        std::unique_lock lock(signals_->mutex);
        if (closing_) signals_->done.wait(lock, [&] { return error_ || closed_; });
        if (closed_ && !error_) return committed_;
        check_usable();
    }
    wait_for(std::make_shared<Job>(Task::close));
    const auto samples = [&] {
        std::lock_guard lock(signals_->mutex);
        closed_ = true;
        return committed_;
    }();
    signals_->done.notify_all();
    return samples;
}

void Writer::encode_jobs() {
    for (;;) {
        std::shared_ptr<Job> job;
        {
            std::unique_lock lock(signals_->mutex);
            signals_->work.wait(lock, [&] { return stopping_ || error_ || !encoding_.empty(); });
            if (stopping_ || error_) return;
            job = std::move(encoding_.front());
            encoding_.pop_front();
        }
        try {
            job->encode(compact_.model());
        } catch (...) {
            job->error = std::current_exception();  // told when its turn comes, so that those before it are kept
        }
        {
            std::lock_guard lock(signals_->mutex);
            job->encoded = true;
            if (!job->error) known_.at(job->header.key).content = job->content;
        }
        signals_->work.notify_all();
        signals_->done.notify_all();
    }
}

void Writer::carry_out(Job& job) {
    switch (job.task) {
        case Task::sample:
            if (job.error) {
                compact_.settle(true);
                series_.commit();
                std::rethrow_exception(job.error);
            }
            if (job.layout.codec == Codec::compact && !job.model)
                compact_.append(std::move(job.header), job.layout, std::move(job.blocks));
            else
                series_.append(job.header, job.blocks, job.model ? job.model->payload : nullptr);
            break;
        case Task::commit:
            compact_.settle(false);
            series_.commit();
            break;
        case Task::close:
            compact_.settle(true);
            series_.close();
            break;
    }
}

void Writer::write_jobs() {
    for (;;) {
        std::shared_ptr<Job> job;
        {
            std::unique_lock lock(signals_->mutex);
            signals_->work.wait(lock,
                                [&] { return stopping_ || error_ || (!order_.empty() && order_.front()->encoded); });
            if (stopping_ || error_) return;
            job = order_.front();
        }
        try {
            carry_out(*job);
        } catch (...) {
            return fail(std::current_exception());
        }
        {
            std::lock_guard lock(signals_->mutex);
            order_.pop_front();
            waiting_ -= job->bytes;
            committed_ = series_.committed();
            job->done = true;
        }
        signals_->room.notify_all();
        signals_->done.notify_all();
    }
}

}  // namespace kdfast::cache
