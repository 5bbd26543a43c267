#include "cache/store/maintenance.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>

#include "cache/compact/compact.h"
#include "cache/crc/crc32c.h"
#include "cache/index/check.h"
#include "cache/index/parts.h"
#include "cache/rows/prove.h"
#include "cache/store/compare.h"
#include "cache/store/frames.h"
#include "cache/store/model_frame.h"
#include "cache/store/scratch.h"
#include "cache/store/shard.h"
#include "core/threads.h"

namespace kdfast::cache {
namespace {

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
        const std::size_t size = frame.blocks.size();
        frame.blocks.resize(size + padding_after_block);
        std::size_t at = 0;
        for (std::size_t b = 0; b < header.blocks.size(); ++b) {
            const Bytes block = Bytes(frame.blocks).subspan(at, header.blocks[b].bytes);
            const std::int64_t tokens = header.tokens_of(b);
            const Destination rows = scratch_.rows(layout, tokens);
            const DecodeRequest request{block, tokens, 0, rows};
            if (model)
                model->decoder.decode(layout, {&request, 1});
            else
                decode(layout, request);
            prove(layout, source_of(rows));
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

// The frames of a shard, which follow each other.
std::span<const Listing::Frame> frames_of(const Catalog& catalog, std::uint32_t shard) {
    const auto [first, last] = std::ranges::equal_range(catalog.listing().frames(), shard, {}, &Listing::Frame::shard);
    return {first, last};
}

// The faults of samples that cannot be read, in any order.
std::vector<Fault> unreadable(const Reader& reader, std::span<const Listing::Frame> frames, const File* file,
                              int threads) {
    std::vector<Fault> faults;
    std::mutex mutex;
    parallel_for(static_cast<std::int64_t>(frames.size()), threads, [&](std::int64_t i) {
        try {
            reader.verify(reader.catalog().listing().place(frames[static_cast<std::size_t>(i)]), file);
        } catch (const Fault& fault) {
            const std::lock_guard lock(mutex);
            faults.push_back(fault);
        }
    });
    return faults;
}

}  // namespace

Verified verify(const std::string& directory, int threads) {
    Verified result;
    // Of the index nothing is believed.
    const Reader reader(directory, &result.faults, Reader::usual_open_files, UseIndex::no);
    const Catalog& catalog = reader.catalog();
    for (const auto& [key, fault] : catalog.listing().conflicts())  // a damaged frame is found below
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
    const std::vector<Listing::Frame>& frames = catalog.listing().frames();
    for (Fault& fault : unreadable(reader, frames, nullptr, threads)) result.faults.push_back(std::move(fault));
    result.samples = frames.size();
    for (const Listing::Frame& frame : frames) result.tokens += frame.entry.tokens;
    for (Fault& fault : check_index(directory)) result.faults.push_back(std::move(fault));
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
    for (const IndexEntry& model : shard.models) check_model(file, shard.shard_id, model);
    const std::span<const Listing::Frame> frames = frames_of(catalog, number);
    parallel_for(static_cast<std::int64_t>(frames.size()), threads, [&](std::int64_t i) {
        read_blocks(file, catalog.frame_header(file, catalog.listing().place(frames[static_cast<std::size_t>(i)])));
    });
}

std::vector<Fault> verify_shard(const Reader& reader, std::uint32_t shard, const std::string& path, int threads) {
    const File file = File::read(path);
    return unreadable(reader, frames_of(reader.catalog(), shard), &file, threads);
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
                const auto writer = id_of(name, suffix);
                if (!writer) continue;
                std::vector<std::string>& shards = writers[*writer];
                if (name != journal_name(*writer)) shards.push_back(name);
            }
            if (name.ends_with(".temporary")) {
                remove_file(join(directory_, name));
                say("removed " + name);
            }
        }
        look_after_index(names);
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

    // It is made anew of what is left, by whoever comes next and is alone.
    void look_after_index(const std::vector<std::string>& names) {
        if (check_index(directory_).empty()) return;
        for (const std::string& name : names)
            if (index_id(name)) remove_if_there(join(directory_, name));
        say("removed an index that is damaged");
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

// The header that all caches of a merge must have, and the keys that were met, with their samples.
class Union {
  public:
    explicit Union(std::string name) : name_(std::move(name)) {}

    // Takes the cache that is there.
    void begin(const Reader& there) {
        const Listing& listing = there.catalog().listing();
        header_ = there.catalog().header_bytes();
        for (std::size_t i = 0; i < listing.size(); ++i)
            known_.emplace(listing.key(listing.at(i)), Sample{&there, &listing.at(i)});
    }
    void require_header(const Catalog& source) {
        if (header_.empty()) header_ = source.header_bytes();
        if (source.header_bytes() != header_)
            throw Fault(Code::mismatch, "the headers of the caches differ: " + name_ + " and this")
                .in(source.directory());
    }
    // Whether the key is new; one that is there must be of the same token ids and, if `compare`, targets.
    bool add(const Reader& source, const Listing::Frame& frame, bool compare) {
        const Listing& listing = source.catalog().listing();
        const auto [found, fresh] = known_.try_emplace(listing.key(frame), Sample{&source, &frame});
        if (fresh) return true;
        const Place place = listing.place(frame);
        const auto refuse = [&](const char* why) {
            throw Fault(Code::duplicate, why).in(source.catalog().directory()).of(place.key);
        };
        const auto& [reader, there] = found->second;
        if ((there->entry.flags & place.entry.flags & flag::hashed) == 0 ||
            there->entry.token_hash != place.entry.token_hash)
            refuse("the key is there with other token ids, or without any to compare");
        if (compare && !same_targets(*reader, reader->catalog().listing().place(*there), source, place))
            refuse(
                "the key is there with the same token ids and other targets; on_duplicate=\"keep\" leaves the first");
        return false;
    }
    const std::vector<std::byte>& header() const { return header_; }

  private:
    struct Sample {
        const Reader* reader;
        const Listing::Frame* frame;
    };
    std::string name_;
    std::vector<std::byte> header_;
    std::unordered_map<std::string_view, Sample> known_;  // keys as their catalogues hold them
};

// What counts for each key of a source, in the order of the disk; throws where frames of a key differ.
template <class Use>
void for_each_sample(const Catalog& source, Use use) {
    const Listing& listing = source.listing();
    for (std::size_t i = 0; i < listing.size(); ++i) {
        const Listing::Frame& frame = listing.at(i);
        const std::string_view key = listing.key(frame);
        if (const auto conflict = listing.conflicts().find(key); conflict != listing.conflicts().end())
            throw Fault(conflict->second).in(source.directory()).of(std::string(key));
        use(frame);
    }
}

std::unique_ptr<const Reader> open_listed(const std::string& path) {
    return std::make_unique<const Reader>(path, nullptr, Reader::usual_open_files, UseIndex::no);
}

}  // namespace

Merged merge(const std::vector<std::string>& paths, const std::string& destination, std::uint64_t shard_bytes,
             bool keep_duplicates) {
    Merged result;
    if (paths.empty()) return result;
    std::vector<std::unique_ptr<const Reader>> sources;
    for (const std::string& path : paths) sources.push_back(open_listed(path));
    // All that can be told before anything is made: a merge that cannot come to its end makes nothing.
    {
        std::unique_ptr<const Reader> there;
        if (exists(join(destination, "cache.header"))) there = open_listed(destination);
        Union all(there ? destination : paths.front());
        if (there) all.begin(*there);
        for (const auto& source : sources) {
            all.require_header(source->catalog());
            for_each_sample(source->catalog(),
                            [&](const Listing::Frame& frame) { all.add(*source, frame, !keep_duplicates); });
        }
    }
    const std::vector<std::byte>& header = sources.front()->catalog().header_bytes();
    make_directories(destination);
    const std::uint64_t writer = random_id();
    if (!exists(join(destination, "cache.header")))
        publish(destination, "cache.header", header, journal_name(writer) + ".temporary");
    const std::unique_ptr<const Reader> there = open_listed(destination);
    Union all(destination);
    all.begin(*there);
    ShardSeries series(destination, all.header(), writer, ShardSeries::Limits{.shard_bytes = shard_bytes});
    for (const auto& source : sources) {
        const Catalog& catalog = source->catalog();
        all.require_header(catalog);
        std::optional<File> file;
        std::optional<ShardFrames> frames;
        std::uint32_t open_shard = 0;
        for_each_sample(catalog, [&](const Listing::Frame& sample) {
            if (!all.add(*source, sample, false)) {
                ++result.there_already;
                return;
            }
            const CatalogShard& shard = catalog.shards()[sample.shard];
            if (!file || open_shard != sample.shard) {
                file.emplace(File::read(catalog.path(shard)));
                frames.emplace(*file, shard.shard_id, catalog.header());
            }
            open_shard = sample.shard;
            ShardFrames::Frame frame = frames->at(sample.entry);
            series.append(frame.header, frame.blocks, frame.model);
            ++result.samples;
        });
    }
    series.close();
    return result;
}

}  // namespace kdfast::cache
