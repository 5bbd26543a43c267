#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/cache.h"
#include "bindings/view.h"
#include "cache/rows/packed.h"

namespace py = pybind11;

namespace kdfast::bindings {
namespace {

void unpack(const View& data, const View& offset, const View& top, const Optional& k_eff, std::uint32_t vocab_size,
            std::uint32_t grid, const View& ids, const View& logprobs, int threads) {
    if (ids.shape.size() != 2 || ids.shape[1] < 0) throw ArgumentError("ids must be (tokens, K)");
    const std::int64_t tokens = ids.shape[0], bytes = data.count();
    cache::Layout layout;
    layout.vocab_size = vocab_size;
    layout.grid = grid;
    layout.kept = static_cast<std::uint32_t>(std::min<std::int64_t>(ids.shape[1], 0xFFFFFFFF));
    cache::PackedSource packed;
    packed.tokens = tokens;
    packed.data = {data.values<std::byte>("data", "uint8", bytes), static_cast<std::size_t>(bytes)};
    packed.offset = offset.values<std::int32_t>("offset", "int32", tokens);
    packed.top = top.values<float>("top", "float32", tokens);
    packed.k_eff = k_eff ? k_eff->values<std::int32_t>("k_eff", "int32", tokens) : nullptr;
    auto* to_ids = ids.values<std::int32_t>("ids", "int32", tokens * layout.kept);
    auto* to_logprobs = logprobs.values<float>("logprobs", "float32", tokens * layout.kept);
    const py::gil_scoped_release release;
    cache::unpack(layout, packed, to_ids, to_logprobs, std::max(1, threads));
}

}  // namespace

void add_packed(py::module_& m) {
    m.def("unpack", &unpack, py::kw_only(), py::arg("data"), py::arg("offset"), py::arg("top"), py::arg("k_eff"),
          py::arg("vocab_size"), py::arg("grid"), py::arg("ids"), py::arg("logprobs"), py::arg("threads"),
          "Fills ids and logprobs (tokens, K) with what packed tokens hold.");
}

}  // namespace kdfast::bindings
