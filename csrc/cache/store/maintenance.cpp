#include "cache/store/maintenance.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "cache/compact/block.h"
#include "cache/crc/crc32c.h"
#include "cache/store/catalog.h"
#include "cache/store/model_frame.h"
#include "cache/store/reader.h"
#include "cache/store/shard.h"
#include "core/threads.h"

namespace kdfast::cache {
namespace {

// Room for one sample, of any kind.
struct Scratch {
    std::vector<std::int32_t> ids, k_eff;
    std::vector<float> values, lse, gold, neg_entropy;

    Destination rows(const IndexEntry& e, std::size_t temperatures) {
        const std::size_t n = e.tokens, entries = n * e.kept;
        ids.resize(entries);
        values.resize(entries);
        lse.resize(n * temperatures);
        k_eff.resize(n);
        gold.resize(n);
        neg_entropy.resize(n);
        const bool drawn = e.codec == Codec::drawn;
        return {.tokens = e.tokens,
                .ids = ids.data(),
                .logprobs = drawn ? nullptr : values.data(),
                .mass = drawn ? values.data() : nullptr,
                .lse = lse.data(),
                .lse_stride = e.tokens,
                .k_eff = e.flags & flag::ragged ? k_eff.data() : nullptr,
                .gold = e.flags & flag::gold ? gold.data() : nullptr,
                .neg_entropy = drawn ? neg_entropy.data() : nullptr};
    }
};

// The blocks of a frame, each verified.
std::vector<std::byte> read_blocks(const File& shard, const FrameHeader& header) {
    std::vector<std::byte> blocks =
        shard.bytes_at(header.offset + header.header_bytes(), header.frame_bytes() - header.header_bytes());
    std::uint64_t at = 0;
    for (std::size_t b = 0; b < header.blocks.size(); ++b) {
        if (!has_crc(Bytes(blocks).subspan(at, header.blocks[b].bytes), header.blocks[b].crc))
            throw Fault(Code::checksum, "the checksum of block " + std::to_string(b) + " does not match")
                .in(shard.path())
                .of(header.key)
                .at(header.offset + header.header_bytes() + at);
        at += header.blocks[b].bytes;
    }
    return blocks;
}

// The frames of one shard, whole, and nothing of them believed.
class ShardFrames {
  public:
    ShardFrames(const File& shard, std::uint64_t shard_id, const CacheHeader& cache)
        : shard_(shard), shard_id_(shard_id), cache_(cache) {}

    struct Frame {
        FrameHeader header;
        std::vector<std::byte> blocks;
        ModelPayload model;  // null where it needs none
    };
    // Verified, what a checksum cannot tell too: a frame that this gives can be read.
    Frame at(const IndexEntry& entry) {
        Frame frame;
        frame.header = read_frame_header(shard_, entry, shard_id_);
        frame.blocks = read_blocks(shard_, frame.header);
        const Model* model = nullptr;
        if (frame.header.codec == Codec::compact && !frame.header.blocks.empty()) {
            model = &model_of(frame.header);
            frame.model = model->payload;
        }
        try {
            decode_all(frame, model);
        } catch (Fault& fault) {
            throw fault.in(shard_.path()).of(frame.header.key).at(entry.offset);
        }
        return frame;
    }

  private:
    struct Model {
        ModelPayload payload;
        CompactDecoder decoder;
    };
    const Model& model_of(const FrameHeader& header) {
        auto found = models_.find(header.model);
        if (found == models_.end()) {
            auto payload = std::make_shared<const std::vector<std::byte>>(
                read_model(shard_, shard_id_, header.model, header.offset));
            CompactDecoder decoder(parse_model(*payload, cache_.vocab_size, cache_.stored_temperatures().size()));
            found = models_.emplace(header.model, Model{std::move(payload), std::move(decoder)}).first;
        }
        return found->second;
    }

    void decode_all(Frame& frame, const Model* model) {
        const FrameHeader& header = frame.header;
        if (header.codec == Codec::drawn && cache_.temperatures.size() != 1)
            corrupt("a drawn frame in a cache of several temperatures");
        const Layout layout = header.layout(cache_);
        const Destination out = scratch_.rows(header.entry(), layout.temperatures.size());
        const std::size_t size = frame.blocks.size();
        frame.blocks.resize(size + padding_after_block);
        std::size_t at = 0;
        for (std::size_t b = 0; b < header.blocks.size(); ++b) {
            const Bytes block = Bytes(frame.blocks).subspan(at, header.blocks[b].bytes);
            const std::int64_t tokens = header.tokens_of(b);
            const Destination rows = out.rows(static_cast<std::int64_t>(b) * header.block_tokens, tokens, header.kept);
            if (model)
                decode_compact(model->decoder, layout, block, tokens, 0, rows);
            else
                decode(layout, block, tokens, 0, rows);
            at += block.size();
        }
        frame.blocks.resize(size);
    }

    const File& shard_;
    const std::uint64_t shard_id_;
    const CacheHeader& cache_;
    std::unordered_map<std::uint64_t, Model> models_;  // by the offset of the first copy
    Scratch scratch_;
};

// One copy of a model, which the index has at `entry`.
void check_model(const File& shard, std::uint64_t shard_id, const IndexEntry& entry) {
    const ModelHeader header = read_model_header(shard, shard_id, entry.offset, entry.offset + entry.frame_bytes);
    if (header.entry() != entry)
        throw Fault(Code::mismatch, "a model frame is not what the index says").in(shard.path()).at(entry.offset);
    static_cast<void>(read_model_copy(shard, header));
}

}  // namespace

Verified verify(const std::string& directory, int threads) {
    Verified result;
    const Reader reader(directory, &result.faults);
    const Catalog& catalog = reader.catalog();
    const std::size_t temperatures = catalog.header().stored_temperatures().size();
    for (const auto& [key, fault] : catalog.conflicts())  // a damaged frame is found below
        if (fault.code == Code::duplicate) result.faults.push_back(Fault(fault).in(directory).of(std::string(key)));
    for (const CatalogShard& shard : catalog.shards()) {
        result.bytes += shard.bytes;
        if (shard.models.empty()) continue;
        const File file = File::read(catalog.path(shard));
        for (const IndexEntry& model : shard.models) try {
                check_model(file, shard.shard_id, model);
            } catch (const Fault& fault) {
                result.faults.push_back(fault);
            }
    }
    const std::vector<Place>& places = catalog.places();
    std::mutex mutex;
    parallel_for(static_cast<std::int64_t>(places.size()), threads, [&](std::int64_t i) {
        const Place& place = places[static_cast<std::size_t>(i)];
        thread_local Scratch scratch;
        try {
            reader.read({.place = &place, .first = 0, .out = scratch.rows(place.entry, temperatures)});
        } catch (const Fault& fault) {
            const std::lock_guard lock(mutex);
            result.faults.push_back(fault);
        }
    });
    result.samples = places.size();
    for (const Place& place : places) result.tokens += place.entry.tokens;
    std::sort(result.faults.begin(), result.faults.end(), [](const Fault& a, const Fault& b) {
        return std::tuple(a.path, a.offset.value_or(0)) < std::tuple(b.path, b.offset.value_or(0));
    });
    return result;
}

void check_shard(const Catalog& catalog, std::uint32_t number, const std::string& path, int threads) {
    const CatalogShard& shard = catalog.shards().at(number);
    const File file = File::read(path);
    try {
        if (!shard.finished) throw Fault(Code::mismatch, "the shard is not finished");
        const std::uint64_t size = file.size();
        if (size != shard.bytes)
            throw Fault(
                size < shard.bytes ? Code::truncated : Code::corrupt,
                "the shard has " + std::to_string(size) + " bytes, " + std::to_string(shard.bytes) + " were committed");
        const std::vector<std::byte> head = file.bytes_at(0, shard.first);
        const Bytes cache_header = Bytes(head).first(catalog.header_bytes().size());
        const ShardHeader header = ShardHeader::parse(Bytes(head).subspan(cache_header.size()));
        if (!std::ranges::equal(cache_header, catalog.header_bytes()) || header.shard_id != shard.shard_id ||
            header.writer != shard.writer || header.ordinal != shard.ordinal)
            throw Fault(Code::mismatch, "the shard is not the one that its name and journal say");
        const Tail tail = Tail::parse(file.bytes_at(size - Tail::size, Tail::size));
        if (tail.shard_id != shard.shard_id || tail.index_offset != shard.end ||
            tail.index_bytes != size - Tail::size - shard.end)
            throw Fault(Code::mismatch, "the shard's tail is not the one that was catalogued");
        static_cast<void>(
            Index::parse(file.bytes_at(shard.end, tail.index_bytes), shard.shard_id, shard.first, shard.end));
    } catch (Fault& fault) {
        throw fault.in(path);
    }
    const std::vector<Place>& places = catalog.places();
    const auto first = std::ranges::lower_bound(places, number, {}, &Place::shard);
    const auto last = std::ranges::upper_bound(places, number, {}, &Place::shard);
    for (const IndexEntry& model : shard.models) check_model(file, shard.shard_id, model);
    parallel_for(last - first, threads,
                 [&](std::int64_t i) { read_blocks(file, catalog.frame_header(file, first[i])); });
}

// --- Repair

namespace {

class Repair {
  public:
    explicit Repair(const std::string& directory) : directory_(directory) {}

    Repaired run() {
        find_header();
        std::map<std::uint64_t, std::vector<std::string>> writers;  // names of their shards
        const std::vector<std::string> names = list_directory(directory_);
        for (const std::string& name : names) {
            for (const char* suffix : {".journal", ".shard", ".open"}) {
                const auto writer = writer_of(name, suffix);
                if (!writer) continue;
                std::vector<std::string>& shards = writers[*writer];
                if (name != journal_name(*writer)) shards.push_back(name);
            }
            if (name.ends_with(".temporary")) {
                remove_file(join(directory_, name));
                say("removed " + name);
            }
        }
        series_.emplace(directory_, header_, random_id(), ShardSeries::Limits{});
        for (const auto& [writer, shards] : writers) look_after(writer, shards);
        series_->close();
        for (const std::string& path : to_remove_) remove_file(path);
        sync_directory(directory_);
        return std::move(result_);
    }

  private:
    void say(const std::string& what) { result_.done.push_back(what); }

    // The header's own file, or the copy at the beginning of any shard.
    void find_header() {
        std::optional<Fault> why;
        const auto take = [&](const std::string& name) {
            try {
                const File file = File::read(join(directory_, name));
                header_ = file.bytes_at(0, std::min<std::uint64_t>(file.size(), most_cache_header));
                std::size_t size = 0;
                cache_ = CacheHeader::parse(header_, &size);
                header_.resize(size);
                if (name == "cache.header" && size != file.size()) corrupt("something follows the cache header");
                return true;
            } catch (Fault& fault) {
                if (!why) why = fault.in(join(directory_, name));
                return false;
            }
        };
        if (take("cache.header")) return;
        for (const std::string& name : list_directory(directory_)) {
            if (!name.ends_with(".shard") && !name.ends_with(".open")) continue;
            if (!take(name)) continue;
            const std::string path = join(directory_, "cache.header");
            if (exists(path)) remove_file(path);
            publish(directory_, "cache.header", header_, "header.temporary");
            say("made cache.header anew from " + name);
            return;
        }
        throw *why;
    }

    void look_after(std::uint64_t writer, const std::vector<std::string>& shards) {
        const std::string name = journal_name(writer), path = join(directory_, name);
        if (!exists(path))
            return salvage_all(writer, shards, Fault(Code::missing, "the journal is not there").in(path));
        File file = File::append_to(path);
        if (!file.lock()) {
            result_.in_use.push_back(name);
            return;
        }
        const File content = File::read(path);
        Journal journal;
        try {
            journal = Journal::parse(content.bytes_at(0, content.size()), writer, header_);
        } catch (Fault& fault) {
            if (fault.code == Code::system) throw;
            to_remove_.push_back(path);
            return salvage_all(writer, shards, fault.in(path));
        }
        if (content.size() != journal.whole) {
            file.truncate(journal.whole);
            file.sync_data();
            say("cut a torn record off " + name);
        }
        for (const JournalShard& shard : journal.shards) {
            if (shard.dropped || is_good(shard)) continue;
            const std::uint64_t kept = salvage(shard, shard.bytes, shard.samples);
            series_->commit();
            file.append(Record{.type = RecordType::drop,
                               .writer = writer,
                               .number = journal.records++,
                               .ordinal = shard.ordinal,
                               .shard_id = shard.shard_id,
                               .time = shard.commits.back().time}
                            .to_bytes());
            file.sync_data();
            say("gave up " + shard_name(writer, shard.ordinal, shard.finished) + ", " + std::to_string(kept) + " of " +
                std::to_string(shard.samples) + " samples kept");
        }
        for (const std::string& stray : shards) {
            const bool wanted = std::ranges::any_of(
                journal.shards, [&](const JournalShard& s) { return !s.dropped && is_named(s, stray) && is_good(s); });
            if (!wanted) to_remove_.push_back(join(directory_, stray));
        }
    }

    static bool is_named(const JournalShard& s, const std::string& name) {
        return name == shard_name(s.writer, s.ordinal, true) || name == shard_name(s.writer, s.ordinal, false);
    }

    static JournalShard named(std::uint64_t writer, const ShardHeader& h) {
        JournalShard shard;
        shard.writer = writer;
        shard.ordinal = h.ordinal;
        shard.shard_id = h.shard_id;
        return shard;
    }

    // Finished, with a right index, and every frame of it right.
    bool is_good(const JournalShard& shard) {
        const std::uint64_t id = shard.shard_id;
        if (const auto known = good_.find(id); known != good_.end()) return known->second;
        bool good = shard.finished;
        try {
            if (good) {
                const File file = File::read(join(directory_, shard_name(shard.writer, shard.ordinal, true)));
                const std::uint64_t first = check_headers(file, shard.writer, shard.ordinal, id);
                const Tail tail = Tail::parse(file.bytes_at(shard.bytes - Tail::size, Tail::size));
                const Index index =
                    Index::parse(file.bytes_at(tail.index_offset, tail.index_bytes), id, first, tail.index_offset);
                good = file.size() == shard.bytes && tail.shard_id == id;
                check_commits(index, shard, first);
                ShardFrames frames(file, id, cache_);
                std::size_t key_at = 0;
                for (const IndexEntry& entry : index.entries) {
                    if (entry.kind == Kind::model) {
                        check_model(file, id, entry);
                        continue;
                    }
                    const FrameHeader header = frames.at(entry).header;
                    good =
                        good && header.entry() == entry && index.keys.compare(key_at, entry.key_bytes, header.key) == 0;
                    key_at += entry.key_bytes;
                }
            }
        } catch (const Fault& fault) {
            if (fault.code == Code::system) throw;
            good = false;
        }
        return good_[id] = good;
    }

    // Where frames begin.
    std::uint64_t check_headers(const File& file, std::uint64_t writer, std::uint32_t ordinal, std::uint64_t id) const {
        const std::vector<std::byte> head = file.bytes_at(0, header_.size() + ShardHeader::size);
        const ShardHeader h = ShardHeader::parse(Bytes(head).subspan(header_.size()));
        if (!std::ranges::equal(Bytes(head).first(header_.size()), header_) || h.writer != writer ||
            h.ordinal != ordinal || h.shard_id != id)
            throw Fault(Code::mismatch, "the shard is not the one that its name and journal say").in(file.path());
        return head.size();
    }

    // Samples that were copied.
    std::uint64_t salvage(const JournalShard& shard, std::uint64_t end, std::uint64_t expected) {
        const bool finished_name = exists(join(directory_, shard_name(shard.writer, shard.ordinal, true)));
        const std::string path = join(directory_, shard_name(shard.writer, shard.ordinal, finished_name));
        std::uint64_t kept = 0;
        std::vector<Fault> damage;
        try {
            const File file = File::read(path);
            const std::uint64_t first = header_.size() + ShardHeader::size;
            end = std::min(end, file.size());
            if (shard.finished && end == shard.bytes && end >= Tail::size) {
                try {
                    end = Tail::parse(file.bytes_at(end - Tail::size, Tail::size)).index_offset;
                } catch (const Fault& fault) {  // where the index begins is not known: its bytes are no frames
                    if (fault.code == Code::system) throw;
                }
            }
            const Index index = scan_frames(file, shard.shard_id, first, std::min(end, file.size()), &damage);
            ShardFrames frames(file, shard.shard_id, cache_);
            for (const IndexEntry& entry : index.entries) {
                if (entry.kind == Kind::model) continue;  // goes with the first frame that names it
                try {
                    ShardFrames::Frame frame = frames.at(entry);
                    series_->append(frame.header, frame.blocks, frame.model);
                    ++kept;
                } catch (Fault& fault) {
                    if (fault.code == Code::system) throw;
                    damage.push_back(fault);
                }
            }
            if (kept < expected) result_.lost.insert(result_.lost.end(), damage.begin(), damage.end());
        } catch (Fault& fault) {
            if (fault.code == Code::system) throw;
            result_.lost.push_back(fault.in(path));
        }
        result_.kept += kept;
        return kept;
    }

    // Shards whose journal says nothing that could be believed.
    void salvage_all(std::uint64_t writer, const std::vector<std::string>& shards, const Fault& why) {
        result_.lost.push_back(why);
        for (const std::string& name : shards) {
            const std::string path = join(directory_, name);
            try {
                const File file = File::read(path);
                const std::vector<std::byte> head = file.bytes_at(0, header_.size() + ShardHeader::size);
                const ShardHeader h = ShardHeader::parse(Bytes(head).subspan(header_.size()));
                if (h.writer != writer || !is_named(named(writer, h), name))
                    throw Fault(Code::mismatch, "the shard is not the one that its name says");
                const std::uint64_t kept = salvage(named(writer, h), file.size(), ~std::uint64_t{0});
                say("gave up " + name + ", " + std::to_string(kept) + " samples kept");
            } catch (Fault& fault) {
                if (fault.code == Code::system) throw;
                result_.lost.push_back(fault.in(path));
            }
            to_remove_.push_back(path);
        }
    }

    const std::string directory_;
    std::vector<std::byte> header_;
    CacheHeader cache_;  // the same
    std::optional<ShardSeries> series_;
    std::unordered_map<std::uint64_t, bool> good_;  // shard_id -> is_good
    std::vector<std::string> to_remove_;            // once all copies are durable
    Repaired result_;
};

}  // namespace

Repaired repair(const std::string& directory) { return Repair(directory).run(); }

// --- Merge

namespace {

// The header that all caches of a merge must have, and the keys that were met, with their token ids' hashes.
class Union {
  public:
    explicit Union(const std::string& destination) : destination_(destination) {}

    // Takes the cache that is there.
    void begin(const Catalog& there) {
        header_ = there.header_bytes();
        for (std::size_t i = 0; i < there.size(); ++i) known_.emplace(there.key(there.at(i)), hash_of(there.at(i)));
    }
    void require_header(const Catalog& source) {
        if (header_.empty()) header_ = source.header_bytes();
        if (source.header_bytes() != header_)
            throw Fault(Code::mismatch, "the headers of the caches differ: " + destination_ + " and this")
                .in(source.directory());
    }
    // Whether the key is new; one that is there must be of the same token ids.
    bool add(const Catalog& source, const std::string& key, const Place& place) {
        const auto hash = hash_of(place);
        const auto [found, fresh] = known_.try_emplace(key, hash);
        if (!fresh && (!found->second || found->second != hash))
            throw Fault(Code::duplicate, "the key is there with other token ids, or without any to compare")
                .in(source.directory())
                .of(key);
        return fresh;
    }
    const std::vector<std::byte>& header() const { return header_; }

  private:
    static std::optional<TokenHash> hash_of(const Place& p) {
        if (p.entry.flags & flag::hashed) return p.entry.token_hash;
        return {};
    }

    std::string destination_;
    std::vector<std::byte> header_;
    std::unordered_map<std::string, std::optional<TokenHash>> known_;
};

// All that indices tell of the sources: a merge that cannot come to its end makes nothing.
void require_mergeable(const std::vector<std::string>& sources, const std::string& destination) {
    const bool there = exists(join(destination, "cache.header"));
    Union all(there ? destination : sources.front());
    if (there) all.begin(Catalog(destination));
    for (const std::string& path : sources) {
        const Catalog source(path);
        all.require_header(source);
        for (std::size_t i = 0; i < source.size(); ++i) {
            const std::string key(source.key(source.at(i)));
            all.add(source, key, *source.find(key));
        }
    }
}

}  // namespace

Merged merge(const std::vector<std::string>& sources, const std::string& destination, std::uint64_t shard_bytes) {
    Merged result;
    if (sources.empty()) return result;
    require_mergeable(sources, destination);
    std::optional<ShardSeries> series;
    Union all(destination);
    const auto open_destination = [&](const std::vector<std::byte>& wanted) {
        make_directories(destination);
        const std::uint64_t writer = random_id();
        if (!exists(join(destination, "cache.header")))
            publish(destination, "cache.header", wanted, journal_name(writer) + ".temporary");
        all.begin(Catalog(destination));
        series.emplace(destination, all.header(), writer, ShardSeries::Limits{.shard_bytes = shard_bytes});
    };
    for (const std::string& path : sources) {
        const Catalog source(path);
        if (!series) open_destination(source.header_bytes());
        all.require_header(source);
        std::optional<File> file;
        std::optional<ShardFrames> frames;
        std::uint32_t open_shard = 0;
        for (std::size_t i = 0; i < source.size(); ++i) {
            const std::string key(source.key(source.at(i)));
            const Place& place = *source.find(key);  // which throws where frames of the key differ
            if (!all.add(source, key, place)) {
                ++result.there_already;
                continue;
            }
            const CatalogShard& shard = source.shards()[place.shard];
            if (!file || open_shard != place.shard) {
                file.emplace(File::read(source.path(shard)));
                frames.emplace(*file, shard.shard_id, source.header());
            }
            open_shard = place.shard;
            ShardFrames::Frame frame = frames->at(place.entry);
            series->append(frame.header, frame.blocks, frame.model);
            ++result.samples;
        }
    }
    if (series) series->close();
    return result;
}

}  // namespace kdfast::cache
