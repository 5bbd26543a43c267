#include "cache/index/update.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cache/crc/crc32c.h"
#include "cache/fault.h"
#include "cache/index/chain.h"
#include "cache/index/parts.h"
#include "cache/store/directory.h"
#include "cache/store/shard.h"

namespace kdfast::cache {
namespace {

constexpr std::uint64_t growth = 4;            // a file is this much larger than the next newer one
constexpr std::uint64_t rows_per_bucket = 44;  // of 56 that a page holds: one in twenty is full
constexpr std::size_t write_bytes = 64 * IndexPage::size;

// A file of the index that is being written, under a name that nobody looks for.
class IndexWriter {
  public:
    IndexWriter(const std::string& directory, std::uint64_t id, std::uint64_t rows)
        : id_(id),
          buckets_(std::max<std::uint64_t>(1, (rows + rows_per_bucket - 1) / rows_per_bucket)),
          file_(File::create(join(directory, index_name(id) + ".temporary"))) {}
    ~IndexWriter() {
        if (!done_) remove_if_there(file_.path());
    }
    IndexWriter(const IndexWriter&) = delete;
    IndexWriter& operator=(const IndexWriter&) = delete;

    void add(const IndexRow& row) {
        const std::uint64_t bucket = bucket_of(row.key, buckets_);
        while (pages_ < bucket || rows_in_page_ == IndexPage::rows) finish_page();
        IndexPage::append_row(pending_, row);
        ++rows_in_page_;
    }

    // With what the caller knows of the tail; the file then has the name `path`.
    void finish(IndexTail tail, const std::vector<IndexedShard>& shards, const std::string& path) {
        while (pages_ < buckets_ || rows_in_page_ > 0) finish_page();
        std::vector<std::byte> list;
        for (const IndexedShard& shard : shards) shard.append_to(list);
        tail.id = id_;
        tail.buckets = buckets_;
        tail.pages = pages_;
        tail.shards = static_cast<std::uint32_t>(shards.size());
        tail.shards_crc = crc32c(list);
        append(pending_, list);
        append(pending_, Bytes(tail.bytes()));
        file_.append(pending_);
        file_.sync_data();
        file_.close();
        rename_file(file_.path(), path);
        done_ = true;
    }

  private:
    void finish_page() {
        IndexPage::finish(pending_, pending_.size() - rows_in_page_ * IndexRow::size, id_, pages_++);
        rows_in_page_ = 0;
        if (pending_.size() < write_bytes) return;
        file_.append(pending_);
        pending_.clear();
    }

    const std::uint64_t id_, buckets_;
    File file_;
    std::vector<std::byte> pending_;
    std::uint64_t pages_ = 0;
    std::size_t rows_in_page_ = 0;
    bool done_ = false;
};

// Rows in the order of their keys, of shards that follow each other in the list of the file that is made of them.
class Input {
  public:
    Input(std::vector<IndexRow> rows, std::uint32_t first_shard) : rows_(std::move(rows)), first_shard_(first_shard) {
        std::ranges::sort(rows_, {}, &IndexRow::key);
    }
    Input(const IndexFile& file, std::uint32_t first_shard)
        : file_(&file), reading_(std::in_place, file), first_shard_(first_shard) {}
    Input(std::unique_ptr<const IndexFile> file, std::uint32_t first_shard)
        : owned_(std::move(file)), file_(owned_.get()), reading_(std::in_place, *file_), first_shard_(first_shard) {}
    Input(Input&&) = default;
    Input& operator=(Input&&) = delete;
    ~Input() {
        if (owned_) remove_if_there(owned_->path());
    }

    std::uint64_t size() const { return file_ ? file_->tail().rows : rows_.size(); }
    std::uint32_t first_shard() const { return first_shard_; }
    // Goes on to the next row; false behind the last.
    bool advance() {
        const IndexRow* next = file_ ? reading_->next() : at_ < rows_.size() ? &rows_[at_++] : nullptr;
        if (!next) return false;
        row_ = *next;
        row_.shard += first_shard_;
        return true;
    }
    const IndexRow& row() const { return row_; }

  private:
    std::vector<IndexRow> rows_;
    std::size_t at_ = 0;
    std::unique_ptr<const IndexFile> owned_;
    const IndexFile* file_ = nullptr;
    std::optional<IndexFile::Rows> reading_;
    std::uint32_t first_shard_;
    IndexRow row_;
};

// use(row) for every row of some inputs, in order.
template <class Use>
void merge(std::vector<Input>& inputs, Use use) {
    const auto later = [&](std::size_t a, std::size_t b) { return inputs[b].row().key < inputs[a].row().key; };
    std::vector<std::size_t> heap;
    for (std::size_t i = 0; i < inputs.size(); ++i)
        if (inputs[i].advance()) heap.push_back(i);
    std::ranges::make_heap(heap, later);
    while (!heap.empty()) {
        std::ranges::pop_heap(heap, later);
        Input& first = inputs[heap.back()];
        use(first.row());
        if (first.advance())
            std::ranges::push_heap(heap, later);
        else
            heap.pop_back();
    }
}

std::uint64_t size_of(const std::vector<Input>& inputs) {
    std::uint64_t rows = 0;
    for (const Input& input : inputs) rows += input.size();
    return rows;
}

class Update {
  public:
    Update(const std::string& path, IndexLimits limits, bool anew)
        : limits_(limits), directory_(path), chain_(path, directory_.header_crc()) {
        if (anew) chain_.forget();
        directory_.read_journals(nullptr);
        chain_.join(directory_);
    }

    void run() {
        std::vector<std::uint32_t> fresh;
        for (const CatalogShard& shard : directory_.shards())
            if (shard.finished && !shard.indexed) fresh.push_back(directory_.number_of(shard));
        if (!fresh.empty()) add(fresh);
        std::vector<std::uint64_t> used;
        for (const IndexChain::Part& part : chain_.parts()) used.push_back(part.file->tail().id);
        used.push_back(made_);
        for (const std::string& name : list_directory(directory_.path())) {
            const auto id = index_id(name);
            if (id && std::ranges::find(used, *id) == used.end()) remove_if_there(join(directory_.path(), name));
        }
    }

  private:
    // A file of these shards, and of those of the newest files that are not much larger; the others stay.
    void add(const std::vector<std::uint32_t>& fresh) {
        std::vector<Input> inputs = read(fresh);
        std::vector<IndexChain::Part>& parts = chain_.parts();
        std::vector<IndexChain::Part> merged;
        for (std::uint64_t rows = size_of(inputs);
             !parts.empty() && parts.front().file->tail().rows <= growth * rows;) {
            rows += parts.front().file->tail().rows;
            merged.push_back(std::move(parts.front()));
            parts.erase(parts.begin());
        }
        for (const IndexChain::Part& part : merged) {
            inputs.emplace_back(*part.file, static_cast<std::uint32_t>(shards_.size()));
            shards_.insert(shards_.end(), part.file->shards().begin(), part.file->shards().end());
        }
        write(inputs);
        sync_directory(directory_.path());
    }

    // The rows of fresh shards, on disk where they are many.
    std::vector<Input> read(const std::vector<std::uint32_t>& fresh) {
        std::vector<Input> inputs;
        std::vector<IndexRow> rows;
        std::uint32_t first = 0;
        const auto put_aside = [&] {
            std::vector<Input> sorted;
            sorted.emplace_back(std::exchange(rows, {}), first);
            inputs.push_back(spill(std::move(sorted)));
            first = static_cast<std::uint32_t>(shards_.size());
            if (inputs.size() < limits_.files_at_once) return;
            Input all = spill(std::exchange(inputs, {}));
            inputs.push_back(std::move(all));
        };
        for (const std::uint32_t number : fresh) {
            if (rows.size() >= limits_.rows_in_memory) put_aside();
            CatalogShard& shard = directory_.shards()[number];
            Index index;
            try {
                index = directory_.read(shard, nullptr);
            } catch (Fault& fault) {
                throw fault.in(directory_.path(shard));
            }
            append_rows(rows, index, static_cast<std::uint32_t>(shards_.size()) - first);
            shards_.push_back(
                {shard.writer, shard.shard_id, shard.bytes, shard.end, shard.samples, shard.tokens, shard.ordinal});
        }
        inputs.emplace_back(std::move(rows), first);
        return inputs;
    }

    // Inputs whose shards follow each other, as one that is on disk.
    Input spill(std::vector<Input> inputs) const {
        const std::uint32_t first = inputs.front().first_shard();
        const std::uint64_t id = random_id();
        const std::string path = join(directory_.path(), index_name(id) + ".sorted.temporary");
        IndexWriter out(directory_.path(), id, size_of(inputs));
        merge(inputs, [&](IndexRow row) {
            row.shard -= first;
            out.add(row);
        });
        out.finish({.header_crc = directory_.header_crc(), .rows = size_of(inputs)},
                   {shards_.begin() + first, shards_.end()}, path);
        return {std::make_unique<const IndexFile>(path, id, directory_.header_crc()), first};
    }

    void write(std::vector<Input>& inputs) {
        const std::uint64_t rows = size_of(inputs);
        made_ = random_id();
        IndexWriter out(directory_.path(), made_, rows);
        IndexTail tail{.header_crc = directory_.header_crc(), .generation = chain_.generation() + 1, .rows = rows};
        if (!chain_.empty()) tail.previous = chain_.parts().front().file->tail().id;
        std::optional<KeyHash> last;
        merge(inputs, [&](const IndexRow& row) {
            if (last != row.key && !chain_.has(row.key)) ++tail.keys;
            last = row.key;
            out.add(row);
        });
        out.finish(tail, shards_, join(directory_.path(), index_name(made_)));
    }

    const IndexLimits limits_;
    Directory directory_;
    IndexChain chain_;                  // what stays of it
    std::vector<IndexedShard> shards_;  // of the file that is made
    std::uint64_t made_ = 0;            // its id
};

}  // namespace

void update_index(const std::string& directory, IndexLimits limits) {
    try {
        Update(directory, limits, false).run();
    } catch (const Fault& fault) {
        // Of a page of the index, which is no reason to be without one.
        if (!fault.path.ends_with(".index") || !is_dispensable(fault)) throw;
        Update(directory, limits, true).run();
    }
}

}  // namespace kdfast::cache
