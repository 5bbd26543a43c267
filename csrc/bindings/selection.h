// Samples, or ranges of them, that one call reads.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/memory.h"
#include "cache/store/reader.h"
#include "core/error.h"

namespace kdfast::bindings {

// Shards, by their number, that lie elsewhere than in the directory, open.
class Elsewhere {
  public:
    using Paths = std::map<std::uint32_t, std::string>;
    explicit Elsewhere(const Paths& paths) {
        for (const auto& [shard, path] : paths) files_.emplace(shard, cache::File::read(path));
    }

    // Where any do, only samples of those are asked for.
    bool has(const cache::Place& place) const { return files_.empty() || files_.contains(place.shard); }
    // Null where it is in the directory.
    const cache::File* file(const cache::Place& place) const {
        const auto found = files_.find(place.shard);
        return found == files_.end() ? nullptr : &found->second;
    }

  private:
    std::map<std::uint32_t, cache::File> files_;
};

// The text of a key that is text, as Python holds it; nothing for another, or half of a surrogate pair.
inline std::optional<std::string_view> text_in(const pybind11::handle key) {
    if (!PyUnicode_Check(key.ptr())) return {};
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(key.ptr(), &size);
    if (text) return std::string_view(text, static_cast<std::size_t>(size));
    PyErr_Clear();
    return {};
}

// Most keys are text or small numbers, of which Python's function says the same, in more time.
inline std::string text_of(const pybind11::handle key, const pybind11::function& key_text) {
    if (const std::optional<std::string_view> text = text_in(key)) return std::string(*text);
    if (PyLong_CheckExact(key.ptr())) {
        int overflow = 0;
        const long long number = PyLong_AsLongLongAndOverflow(key.ptr(), &overflow);
        if (overflow == 0) return std::to_string(number);
    }
    return key_text(key).cast<std::string>();
}

// What Python selects, found in the index and put into groups whose fields are alike. All of it is done here, as in
// Python it took longer than reading a range does.
class Selection {
  public:
    Selection(std::shared_ptr<const cache::Reader> reader, const pybind11::iterable& selectors,
              const pybind11::function& key_text)
        : reader_(std::move(reader)) {
        for (const pybind11::handle selector : selectors) add(selector, key_text);
    }

    std::size_t size() const { return ranges_.size(); }
    const cache::Place& place(std::size_t i) const { return ranges_.at(i).place; }
    std::pair<std::int64_t, std::int64_t> range(std::size_t i) const {
        return {ranges_.at(i).first, ranges_.at(i).count};
    }
    const std::string& key(std::size_t i) const { return place(i).key; }

    // Numbers of those that hold some of them, ascending.
    std::set<std::uint32_t> shards() const {
        std::set<std::uint32_t> out;
        for (const Range& r : ranges_) out.insert(r.place.shard);
        return out;
    }

    // Of the entries that a read gives back, and of what it reads for them.
    std::pair<std::uint64_t, std::uint64_t> bytes() const {
        std::uint64_t given = 0, stored = 0;
        for (const Range& r : ranges_) {
            const cache::IndexEntry& e = r.place.entry;
            const auto count = static_cast<std::uint64_t>(r.count);
            given += count * e.kept * (sizeof(std::int32_t) + sizeof(float));
            if (count > 0) stored += e.frame_bytes / e.tokens * count;
        }
        return {given, stored};
    }

    // Of each group K, the method, whether it is ragged and has gold, the places in the order asked for, and the tokens
    // of each.
    pybind11::list groups() const {
        pybind11::list out;
        for (const Group& g : groups_) {
            pybind11::list places, counts;
            for (const std::size_t i : g.places) {
                places.append(i);
                counts.append(ranges_[i].count);
            }
            const cache::IndexEntry& e = g.entry;
            const std::string_view name = cache::method_names[static_cast<std::size_t>(e.method)];
            out.append(pybind11::make_tuple(e.kept, pybind11::str(name.data(), name.size()),
                                            (e.flags & cache::flag::ragged) != 0, (e.flags & cache::flag::gold) != 0,
                                            std::move(places), std::move(counts)));
        }
        return out;
    }

    // For each group the addresses of its tensors, 0 where it has none, with n the tokens of the group, one range
    // behind the other. Where paths are given, only what lies in their shards is read.
    using Addresses = std::array<std::uintptr_t, 6>;

    // ids (n, K), logprobs or mass (n, K), lse (temperatures, n), k_eff, gold and neg_entropy (n).
    void read(const std::vector<Addresses>& tensors, int threads, const Elsewhere::Paths& paths) const {
        if (tensors.size() != groups_.size()) throw ArgumentError("tensors for each group must be given");
        const Elsewhere elsewhere(paths);
        std::vector<cache::ReadRequest> requests;
        requests.reserve(ranges_.size());
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const Group& group = groups_[g];
            const bool drawn = group.drawn();
            const auto floats = [&](std::size_t i) { return reinterpret_cast<float*>(tensors[g][i]); };
            const auto ints = [&](std::size_t i) { return reinterpret_cast<std::int32_t*>(tensors[g][i]); };
            cache::Destination all{.tokens = group.tokens,
                                   .ids = ints(0),
                                   .logprobs = drawn ? nullptr : floats(1),
                                   .mass = drawn ? floats(1) : nullptr,
                                   .lse = floats(2),
                                   .lse_stride = group.tokens,
                                   .k_eff = ints(3),
                                   .gold = floats(4),
                                   .neg_entropy = floats(5)};
            std::int64_t row = 0;
            for (const std::size_t i : group.places) {
                const Range& r = ranges_[i];
                if (elsewhere.has(r.place))
                    requests.push_back(
                        {&r.place, r.first, all.rows(row, r.count, group.entry.kept), elsewhere.file(r.place)});
                row += r.count;
            }
        }
        const pybind11::gil_scoped_release release;
        reader_->read(std::move(requests), threads);
    }

    // offset and top (n), lse (temperatures, n), k_eff and gold (n), and the bytes of each place; of the fixed codec.
    std::vector<std::pair<std::size_t, PackedData>> pack(const std::vector<Addresses>& tensors, int threads,
                                                         const Elsewhere::Paths& paths) const {
        if (tensors.size() != groups_.size()) throw ArgumentError("tensors for each group must be given");
        const Elsewhere elsewhere(paths);
        std::vector<std::pair<std::size_t, PackedData>> data;
        std::vector<cache::PackRequest> requests;
        data.reserve(ranges_.size());  // whose parts requests point to
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const auto [offset, top, lse, k_eff, gold, none] = tensors[g];
            const cache::Destination all{.tokens = groups_[g].tokens,
                                         .lse = reinterpret_cast<float*>(lse),
                                         .lse_stride = groups_[g].tokens,
                                         .k_eff = reinterpret_cast<std::int32_t*>(k_eff),
                                         .gold = reinterpret_cast<float*>(gold)};
            std::int64_t row = 0;
            for (const std::size_t i : groups_[g].places) {
                const Range& r = ranges_[i];
                if (elsewhere.has(r.place)) {
                    PackedData& to = data.emplace_back(i, PackedData(r.place.entry, r.count)).second;
                    requests.push_back({&r.place, r.first, r.count,
                                        cache::Packed{&to.bytes, reinterpret_cast<std::int32_t*>(offset) + row,
                                                      reinterpret_cast<float*>(top) + row, &to.grid,
                                                      all.rows(row, r.count, r.place.entry.kept)},
                                        elsewhere.file(r.place)});
                }
                row += r.count;
            }
        }
        const pybind11::gil_scoped_release release;
        reader_->pack(std::move(requests), threads);
        return data;
    }

  private:
    struct Range {
        cache::Place place;
        std::int64_t first, count;  // tokens
    };
    struct Group {
        cache::IndexEntry entry;  // of the first
        std::vector<std::size_t> places;
        std::int64_t tokens = 0;

        bool drawn() const { return entry.method == cache::Method::sample || entry.method == cache::Method::pps; }
        bool takes(const cache::IndexEntry& e) const {
            constexpr auto shown = static_cast<std::uint8_t>(cache::flag::ragged | cache::flag::gold);
            return e.kept == entry.kept && e.method == entry.method && ((e.flags ^ entry.flags) & shown) == 0;
        }
    };

    void add(const pybind11::handle selector, const pybind11::function& key_text) {
        const bool pair = PyTuple_Check(selector.ptr()) && PyTuple_GET_SIZE(selector.ptr()) == 2;
        const pybind11::handle key = pair ? PyTuple_GET_ITEM(selector.ptr(), 0) : selector.ptr();
        cache::Place place = reader_->find(text_of(key, key_text));
        const auto tokens = static_cast<std::int64_t>(place.entry.tokens);
        Range range{{}, 0, tokens};
        if (pair) {
            const pybind11::handle part = PyTuple_GET_ITEM(selector.ptr(), 1);
            if (!PySlice_Check(part.ptr()))
                throw pybind11::type_error("reader[key, start:stop] takes a slice, got " +
                                           std::string(Py_TYPE(part.ptr())->tp_name));
            Py_ssize_t start = 0, stop = 0, step = 0;
            if (PySlice_Unpack(part.ptr(), &start, &stop, &step) != 0) throw pybind11::error_already_set();
            if (step != 1)
                throw pybind11::index_error("reader[key, start:stop] takes no step, got " + std::to_string(step));
            range.count = PySlice_AdjustIndices(tokens, &start, &stop, step);
            range.first = start;
        }
        std::size_t g = 0;  // there are few
        while (g < groups_.size() && !groups_[g].takes(place.entry)) ++g;
        if (g == groups_.size()) groups_.push_back({place.entry, {}, 0});
        groups_[g].places.push_back(ranges_.size());
        groups_[g].tokens += range.count;
        range.place = std::move(place);
        ranges_.push_back(std::move(range));
    }

    std::shared_ptr<const cache::Reader> reader_;
    std::vector<Range> ranges_;
    std::vector<Group> groups_;
};

}  // namespace kdfast::bindings
