#include "bindings/cache.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>

#include "bindings/selection.h"
#include "bindings/view.h"
#include "cache/fault.h"
#include "cache/index/update.h"
#include "cache/store/maintenance.h"
#include "cache/store/reader.h"
#include "cache/store/writer.h"

namespace py = pybind11;

namespace kdfast::bindings {
namespace {

using cache::Fault;
using cache::Place;

py::object to_python(const Fault& fault) {
    const auto known = [](const std::string& text) -> py::object {
        return text.empty() ? py::object(py::none()) : py::str(text);
    };
    const py::object offset = fault.offset ? py::object(py::int_(*fault.offset)) : py::none();
    py::object error = py::module_::import("kdfast.cache.error")
                           .attr("CacheError")(fault.what(), cache::code_names[static_cast<std::size_t>(fault.code)],
                                               known(fault.path), known(fault.key), offset);
    if (fault.code == cache::Code::system && fault.number != 0)
        error.attr("__cause__") =
            py::module_::import("builtins").attr("OSError")(fault.number, fault.what(), known(fault.path));
    return error;
}

template <class T>
T* optional_values(const Optional& view, const char* name, const char* type, std::int64_t expected) {
    return view ? view->values<T>(name, type, expected) : nullptr;
}

// The tensors of targets that are written, by name.
struct Tensors {
    View ids;
    Optional logprobs, mass, lse, k_eff, gold, neg_entropy;

    cache::Source targets(std::int64_t kept, std::int64_t temperatures) const {
        if (ids.shape.size() != 2 || ids.shape[1] != kept) throw ArgumentError("ids must be (tokens, K)");
        cache::Source t;
        t.tokens = ids.shape[0];
        const std::int64_t entries = t.tokens * kept;
        t.ids = ids.values<std::int32_t>("ids", "int32", entries);
        t.logprobs = optional_values<float>(logprobs, "logprobs", "float32", entries);
        t.mass = optional_values<float>(mass, "mass", "float32", entries);
        t.lse = optional_values<float>(lse, "lse", "float32", t.tokens * temperatures);
        t.lse_stride = t.tokens;
        t.k_eff = optional_values<std::int32_t>(k_eff, "k_eff", "int32", t.tokens);
        t.gold = optional_values<float>(gold, "gold", "float32", t.tokens);
        t.neg_entropy = optional_values<float>(neg_entropy, "neg_entropy", "float32", t.tokens);
        if (temperatures > 0 && !lse) throw ArgumentError("lse is missing");
        return t;
    }
};

void require(const Optional& field, bool wanted, const char* name) {
    if (field.has_value() != wanted)
        throw ArgumentError(std::string(name) + (wanted ? " is missing" : " has no place in this sample"));
}

bool is_drawn(cache::Method m) { return m == cache::Method::sample || m == cache::Method::pps; }

std::string method_name(cache::Method m) { return std::string(cache::method_names[static_cast<std::size_t>(m)]); }

py::object hash_of(const cache::IndexEntry& e) {
    if (!(e.flags & cache::flag::hashed)) return py::none();
    return py::bytes(reinterpret_cast<const char*>(e.token_hash.data()), e.token_hash.size());
}

py::dict header_of(const cache::Catalog& catalog) {
    using namespace py::literals;
    const cache::CacheHeader& header = catalog.header();
    return py::dict("vocab_size"_a = header.vocab_size, "temperatures"_a = header.temperatures,
                    "shift"_a = header.shift, "metadata"_a = header.metadata, "crc"_a = catalog.header_crc());
}

// One sample of the index, as Python asks for it before it makes tensors.
struct SampleEntry {
    Place place;
};

std::shared_ptr<cache::Reader> open_reader(const std::string& path, bool damaged, std::size_t open_files,
                                           std::vector<Fault>& damage) {
    if (open_files == 0) throw ArgumentError("open_files must be at least 1");
    const py::gil_scoped_release release;
    return std::make_shared<cache::Reader>(path, damaged ? &damage : nullptr, open_files);
}

struct CacheReader {
    std::vector<Fault> damage;
    std::shared_ptr<cache::Reader> reader;

    CacheReader(const std::string& path, bool damaged, std::size_t open_files)
        : reader(open_reader(path, damaged, open_files, damage)) {}
};

// Keys of a reader, which lives as long as these.
class Keys {
  public:
    explicit Keys(std::shared_ptr<const cache::Reader> reader)
        : reader_(std::move(reader)), keys_(reader_->catalog()) {}
    py::list next(std::size_t most) {
        std::vector<std::string> found;
        {
            const py::gil_scoped_release release;
            while (found.size() < most) {
                std::optional<std::string> key = keys_.next();
                if (!key) break;
                found.push_back(*std::move(key));
            }
        }
        py::list out;
        for (const std::string& key : found) out.append(py::str(key));
        return out;
    }

  private:
    std::shared_ptr<const cache::Reader> reader_;
    cache::Catalog::Keys keys_;
};

bool write(cache::Writer& writer, const std::string& key, const std::string& method, double parameter,
           std::optional<std::uint64_t> seed, const std::optional<std::string>& token_hash, const Tensors& tensors,
           std::int64_t temperatures) {
    cache::Sample sample;
    sample.key = key;
    const auto found = std::find(cache::method_names.begin(), cache::method_names.end(), method);
    if (found == cache::method_names.end()) throw ArgumentError("unknown method " + method);
    sample.method = static_cast<cache::Method>(found - cache::method_names.begin());
    if (tensors.ids.shape.size() != 2) throw ArgumentError("ids must be (tokens, K)");
    sample.kept = static_cast<std::uint32_t>(std::min<std::int64_t>(tensors.ids.shape[1], 0xFFFFFFFF));
    sample.parameter = parameter;
    sample.seed = seed;
    if (token_hash) {
        if (token_hash->size() != 16) throw ArgumentError("token_hash must be 16 bytes");
        std::memcpy(sample.token_hash.emplace().data(), token_hash->data(), 16);
    }
    require(tensors.logprobs, !is_drawn(sample.method), "logprobs");
    require(tensors.mass, is_drawn(sample.method), "mass");
    require(tensors.neg_entropy, is_drawn(sample.method), "neg_entropy");
    sample.targets = tensors.targets(tensors.ids.shape[1], temperatures);
    const py::gil_scoped_release release;
    return writer.write(sample);
}

std::unique_ptr<cache::Writer> make_writer(const std::string& path, std::uint32_t vocab_size,
                                           const std::vector<double>& temperatures, std::uint8_t shift,
                                           const std::string& metadata, const std::string& tier, std::uint8_t grid,
                                           std::uint16_t block_tokens, std::uint64_t shard_bytes,
                                           std::uint64_t commit_bytes, std::uint64_t queue_bytes, int threads,
                                           bool keep_duplicates) {
    cache::WriterOptions options;
    options.header = {.vocab_size = vocab_size, .shift = shift, .temperatures = temperatures, .metadata = metadata};
    if (tier == "compact")
        options.tier = cache::Codec::compact;
    else if (tier != "fixed")
        throw ArgumentError("tier must be one of 'fixed', 'compact', got '" + tier + "'");
    options.grid = grid;
    options.block_tokens = block_tokens;
    options.limits = {.shard_bytes = shard_bytes, .commit_bytes = commit_bytes};
    options.queue_bytes = queue_bytes;
    options.threads = threads;
    options.keep_duplicates = keep_duplicates;
    const py::gil_scoped_release release;
    return std::make_unique<cache::Writer>(path, std::move(options));
}

// Those of some keys that have no sample.
py::list missing(const cache::Writer& writer, const py::iterable& keys, const py::function& key_text) {
    const py::tuple given(keys);  // which nobody changes meanwhile
    std::deque<std::string> made;
    std::vector<std::string_view> texts;
    texts.reserve(given.size());
    for (const py::handle key : given) {
        if (const std::optional<std::string_view> text = text_in(key))
            texts.push_back(*text);
        else
            texts.push_back(made.emplace_back(text_of(key, key_text)));
    }
    const std::vector<bool> have = [&] {
        const py::gil_scoped_release release;
        return writer.have(texts);
    }();
    py::list out;
    for (std::size_t i = 0; i < have.size(); ++i)
        if (!have[i]) out.append(given[i]);
    return out;
}

py::list to_python(const std::vector<Fault>& faults) {
    py::list out;
    for (const Fault& fault : faults) out.append(to_python(fault));
    return out;
}

}  // namespace

void add_cache(py::module_& m) {
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const Fault& fault) {
            const py::object raised = to_python(fault);
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
        }
    });

    py::class_<Tensors>(m, "CacheTensors", "The tensors of one sample's targets.")
        .def(py::init<View, Optional, Optional, Optional, Optional, Optional, Optional>(), py::arg("ids"),
             py::kw_only(), py::arg("logprobs") = py::none(), py::arg("mass") = py::none(), py::arg("lse") = py::none(),
             py::arg("k_eff") = py::none(), py::arg("gold") = py::none(), py::arg("neg_entropy") = py::none());

    const auto entry = [](const SampleEntry& s) -> const cache::IndexEntry& { return s.place.entry; };
    py::class_<SampleEntry>(m, "CacheEntry", "What the index of a cache says of a sample.")
        .def_property_readonly("tokens", [=](const SampleEntry& s) { return entry(s).tokens; })
        .def_property_readonly("kept", [=](const SampleEntry& s) { return entry(s).kept; })
        .def_property_readonly("method", [=](const SampleEntry& s) { return method_name(entry(s).method); })
        .def_property_readonly("tier",
                               [=](const SampleEntry& s) {
                                   constexpr const char* names[] = {"", "fixed", "compact", "drawn"};
                                   return names[static_cast<std::size_t>(entry(s).codec)];
                               })
        .def_property_readonly("ragged",
                               [=](const SampleEntry& s) { return (entry(s).flags & cache::flag::ragged) != 0; })
        .def_property_readonly("gold", [=](const SampleEntry& s) { return (entry(s).flags & cache::flag::gold) != 0; })
        .def_property_readonly("token_hash", [=](const SampleEntry& s) { return hash_of(entry(s)); })
        .def_property_readonly("frame_bytes", [=](const SampleEntry& s) { return entry(s).frame_bytes; })
        .def_property_readonly("offset", [=](const SampleEntry& s) { return entry(s).offset; })
        .def_property_readonly("shard", [](const SampleEntry& s) { return s.place.shard; });

    py::class_<CacheReader>(m, "CacheReader", "Samples out of a cache, by key.")
        .def(py::init<const std::string&, bool, std::size_t>(), py::arg("path"), py::arg("damaged"),
             py::arg("open_files") = cache::Reader::usual_open_files)
        .def_property_readonly("header", [](const CacheReader& r) { return header_of(r.reader->catalog()); })
        .def_property_readonly("damage", [](const CacheReader& r) { return to_python(r.damage); })
        .def_property_readonly(
            "shards",
            [](const CacheReader& r) {
                py::list out;
                for (const auto& s : r.reader->catalog().shards())
                    out.append(py::make_tuple(s.file, s.bytes, s.samples, s.tokens, s.shard_id, s.finished));
                return out;
            })
        .def("__len__", [](const CacheReader& r) { return r.reader->catalog().size(); })
        .def_property_readonly("indexed_shards",
                               [](const CacheReader& r) { return r.reader->catalog().indexed_shards(); })
        .def("keys", [](const CacheReader& r) { return Keys(r.reader); })
        .def(
            "__contains__",
            [](const CacheReader& r, const std::string& key) { return r.reader->catalog().find(key).has_value(); },
            py::arg("key"))
        .def(
            "find", [](const CacheReader& r, const std::string& key) { return SampleEntry{r.reader->find(key)}; },
            py::arg("key"))
        .def(
            "details",
            [](const CacheReader& r, const SampleEntry& s, const Elsewhere::Paths& paths) {
                const cache::FrameHeader h = [&] {
                    const py::gil_scoped_release release;
                    const Elsewhere elsewhere(paths);
                    const cache::File* file = elsewhere.file(s.place);
                    return file ? r.reader->header(*file, s.place) : r.reader->header(s.place);
                }();
                const py::object seed =
                    h.flags & cache::flag::seeded ? py::object(py::int_(h.seed)) : py::object(py::none());
                return py::make_tuple(h.parameter, seed, h.grid, h.block_tokens, h.blocks.size());
            },
            py::arg("entry"), py::arg("files") = Elsewhere::Paths{})
        .def(
            "check_shard",
            [](const CacheReader& r, std::uint32_t shard, const std::string& path, int threads) {
                if (shard >= r.reader->catalog().shards().size()) throw ArgumentError("no shard has this number");
                cache::check_shard(r.reader->catalog(), shard, path, std::max(1, threads));
            },
            py::arg("shard"), py::arg("path"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
        .def(
            "verify_shard",
            [](const CacheReader& r, std::uint32_t shard, const std::string& path, int threads) {
                if (shard >= r.reader->catalog().shards().size()) throw ArgumentError("no shard has this number");
                std::vector<Fault> faults;
                {
                    const py::gil_scoped_release release;
                    faults = cache::verify_shard(*r.reader, shard, path, std::max(1, threads));
                }
                return to_python(faults);
            },
            py::arg("shard"), py::arg("path"), py::arg("threads"))
        .def(
            "select",
            [](const CacheReader& r, const py::iterable& selectors, const py::function& key_text) {
                return Selection(r.reader, selectors, key_text);
            },
            py::arg("selectors"), py::arg("key_text"));

    py::class_<Keys>(m, "CacheKeys", "The keys of a cache, in the order of the disk.")
        .def("next", &Keys::next, py::arg("most"), "As many more as there are, up to `most`.");

    py::class_<Selection>(m, "CacheSelection", "Samples, or ranges of them, that one call reads.")
        .def("__len__", &Selection::size)
        .def("key", &Selection::key, py::arg("i"))
        .def("range", &Selection::range, py::arg("i"))
        .def(
            "entry", [](const Selection& s, std::size_t i) { return SampleEntry{s.place(i)}; }, py::arg("i"))
        .def_property_readonly("shards", &Selection::shards)
        .def_property_readonly("groups", &Selection::groups)
        .def_property_readonly("bytes", &Selection::bytes)
        .def(
            "read",
            [](const Selection& s, const std::vector<Selection::Addresses>& tensors, int threads,
               const Elsewhere::Paths& paths) { s.read(tensors, std::max(1, threads), paths); },
            py::arg("tensors"), py::arg("threads"), py::arg("files") = Elsewhere::Paths{})
        .def(
            "pack",
            [](const Selection& s, const std::vector<Selection::Addresses>& tensors, int threads,
               const Elsewhere::Paths& paths) { return s.pack(tensors, std::max(1, threads), paths); },
            py::arg("tensors"), py::arg("threads"), py::arg("files") = Elsewhere::Paths{});

    py::class_<Memory>(m, "CacheMemory", py::buffer_protocol(),
                       "Uninitialised bytes, from those that others have left.")
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer([](const Memory& memory) { return memory.view(); });

    py::class_<PackedData>(m, "CachePackedData", py::buffer_protocol(), "The bytes of a sample's packed tokens.")
        .def("__len__", [](const PackedData& p) { return p.bytes.size(); })
        .def_readonly("grid", &PackedData::grid)
        .def_buffer([](PackedData& p) { return p.view(); });

    py::class_<cache::Writer>(m, "CacheWriter", "Samples into a cache, behind a bounded queue.")
        .def(py::init(&make_writer), py::kw_only(), py::arg("path"), py::arg("vocab_size"), py::arg("temperatures"),
             py::arg("shift"), py::arg("metadata"), py::arg("tier"), py::arg("grid"), py::arg("block_tokens"),
             py::arg("shard_bytes"), py::arg("commit_bytes"), py::arg("queue_bytes"), py::arg("threads"),
             py::arg("keep_duplicates"))
        .def("write", &write, py::kw_only(), py::arg("key"), py::arg("method"), py::arg("parameter"), py::arg("seed"),
             py::arg("token_hash"), py::arg("tensors"), py::arg("temperatures"))
        .def("__contains__", &cache::Writer::has, py::arg("key"))
        .def("missing", &missing, py::arg("keys"), py::arg("key_text"))
        .def("commit", &cache::Writer::commit, py::call_guard<py::gil_scoped_release>())
        .def("close", &cache::Writer::close, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("damage", [](const cache::Writer& w) { return to_python(w.damage()); })
        .def_property_readonly("id", &cache::Writer::id)
        .def_property_readonly("waiting_bytes", &cache::Writer::waiting_bytes);

    m.def(
        "cache_verify",
        [](const std::string& path, int threads) {
            const cache::Verified v = [&] {
                const py::gil_scoped_release release;
                return cache::verify(path, std::max(1, threads));
            }();
            return py::make_tuple(v.samples, v.tokens, v.bytes, to_python(v.faults));
        },
        py::arg("path"), py::arg("threads"), "Checks everything; what was looked at, and the faults.");
    m.def(
        "cache_repair",
        [](const std::string& path) {
            const cache::Repaired r = [&] {
                const py::gil_scoped_release release;
                return cache::repair(path);
            }();
            return py::make_tuple(r.kept, to_python(r.lost), r.done, r.in_use);
        },
        py::arg("path"), "Saves what can be saved; samples copied, what was lost, what was done, journals in use.");
    m.def(
        "cache_update_index", [](const std::string& path) { cache::update_index(path); }, py::arg("path"),
        py::call_guard<py::gil_scoped_release>(), "Adds the samples of finished shards to the index of the directory.");
    m.def(
        "cache_merge",
        [](const std::vector<std::string>& sources, const std::string& destination, std::uint64_t shard_bytes,
           bool keep_duplicates) {
            const py::gil_scoped_release release;
            const cache::Merged merged = cache::merge(sources, destination, shard_bytes, keep_duplicates);
            return std::pair(merged.samples, merged.there_already);
        },
        py::arg("sources"), py::arg("destination"), py::arg("shard_bytes"), py::arg("keep_duplicates"),
        "Several caches into one.");
}

}  // namespace kdfast::bindings
