// The extension module: checks what arrives, releases the GIL, calls the core. Tensors cross as pointers, shapes and
// strides, so the module neither links torch nor depends on its version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "bindings/cache.h"
#include "bindings/view.h"
#include "core/error.h"
#include "core/pages.h"
#include "cpu/apart.h"
#include "cpu/dispatch.h"
#include "cpu/sort.h"

namespace py = pybind11;

namespace {

using kdfast::ArgumentError;
using kdfast::DType;
using kdfast::Rows;
using kdfast::bindings::Optional;
using kdfast::bindings::View;
using kdfast::cpu::DenseCall;

std::vector<kdfast::cpu::Term> parse_terms(const std::vector<std::string>& names, const std::vector<double>& weights,
                                           const std::vector<double>& parameters) {
    if (names.size() != weights.size() || names.size() != parameters.size())
        throw ArgumentError("names, weights and parameters must have the same length");
    std::vector<kdfast::cpu::Term> terms;
    for (std::size_t i = 0; i < names.size(); ++i) {
        const auto& known = kdfast::cpu::divergence_names;
        const auto found = std::find(known.begin(), known.end(), names[i]);
        if (found == known.end()) throw ArgumentError("unknown divergence " + names[i]);
        terms.push_back({static_cast<kdfast::cpu::Divergence>(found - known.begin()), static_cast<float>(weights[i]),
                         static_cast<float>(parameters[i])});
    }
    return terms;
}

kdfast::cpu::SparseTargets parse_sparse(const View& ids, const Optional& values, const Optional& per_row,
                                        std::int64_t columns, const std::string& rule, std::int64_t rows) {
    kdfast::cpu::SparseTargets s;
    const auto& known = kdfast::cpu::tail_rule_names;
    const auto found = std::find(known.begin(), known.end(), rule);
    if (found == known.end()) throw ArgumentError("unknown tail rule " + rule);
    if (!values) throw ArgumentError("kept_ids need kept_values");
    s.rule = static_cast<kdfast::cpu::TailRule>(found - known.begin());
    s.kept = ids.shape.empty() ? 0 : ids.shape.back();
    s.columns = columns;
    s.ids = ids.values<std::int32_t>("kept_ids", "int32", rows * s.kept);
    static constexpr std::int32_t nothing = -1;
    if (!s.ids) s.ids = &nothing;  // no entry has no address, and is a teacher nevertheless
    s.values = values->values<float>("kept_values", "float32", rows * s.kept);
    if (per_row) s.per_row = per_row->values<float>("kept_per_row", "float32", rows);
    return s;
}

void dense(const std::string& passes, const View& student, const std::vector<View>& teachers,
           const Optional& teacher_weights, const Optional& labels, const Optional& counted, double temperature,
           const std::vector<std::string>& names, const std::vector<double>& weights,
           const std::vector<double>& parameters, bool mix_logits, std::int64_t columns, double label_smoothing,
           const Optional& soft, const Optional& hard, const Optional& z2, const Optional& dsoft_dtemperature,
           const Optional& stats, const Optional& observed, const Optional& grad, const Optional& c_soft,
           const Optional& c_hard, const Optional& c_z, const Optional& logit_sum, const Optional& values,
           bool values_with_dtemperature, const Optional& kept_ids, const Optional& kept_values,
           const Optional& kept_per_row, std::int64_t kept_columns, const std::string& tail_rule,
           const std::vector<double>& scales, const std::vector<double>& softcaps, int threads) {
    DenseCall call;
    if (student.shape.empty()) throw ArgumentError("student must be (..., V)");
    const std::vector<std::int64_t> leading(student.shape.begin(), student.shape.end() - 1);
    call.rows = 1;
    for (const std::int64_t s : leading) call.rows *= s;
    call.student = student.rows("student", leading, true);
    if (call.student.columns < 1) throw ArgumentError("student must have at least one column");
    for (const View& t : teachers) {
        call.teachers.push_back(t.rows("teacher", leading, true));
        if (call.teachers.back().columns < columns)
            throw ArgumentError("teacher has fewer columns than the distillation term");
    }
    if (scales.size() != softcaps.size() || (!scales.empty() && scales.size() != teachers.size() + 1))
        throw ArgumentError("scales and softcaps must be those of the student and every teacher, or empty");
    for (std::size_t k = 0; k < scales.size(); ++k) {
        const kdfast::cpu::Cap cap{static_cast<float>(scales[k]), static_cast<float>(softcaps[k])};
        k == 0 ? static_cast<void>(call.student_cap = cap) : call.teacher_caps.push_back(cap);
    }
    call.columns = columns;
    if (columns < 1 || columns > call.student.columns) throw ArgumentError("columns must lie in [1, V]");
    call.mix_logits = mix_logits && teachers.size() > 1;
    call.terms = parse_terms(names, weights, parameters);
    if (kept_ids) {
        if (!teachers.empty()) throw ArgumentError("a call has teachers or kept columns, not both");
        call.sparse = parse_sparse(*kept_ids, kept_values, kept_per_row, kept_columns, tail_rule, call.rows);
    }
    if (call.taught() && call.terms.empty()) throw ArgumentError("a teacher needs at least one divergence");
    call.temperature = temperature;
    call.label_smoothing = static_cast<float>(label_smoothing);
    call.threads = std::max(1, threads);
    if (teachers.size() > 1) {
        if (!teacher_weights) throw ArgumentError("several teachers need teacher_weights");
        const auto n = static_cast<std::int64_t>(teachers.size());
        const bool per_row = teacher_weights->shape.size() > 1;
        call.teacher_weights =
            teacher_weights->values<float>("teacher_weights", "float32", per_row ? n * call.rows : n);
        call.teacher_weights_stride = per_row ? call.rows : 1;
        call.teacher_weights_per_row = per_row ? 1 : 0;
    }
    const auto per_row = [&](const char* name, const Optional& v) {
        return v ? v->values<float>(name, "float32", call.rows) : nullptr;
    };
    if (labels) call.labels = labels->values<std::int64_t>("labels", "int64", call.rows);
    if (counted) call.counted = counted->values<bool>("counted", "bool", call.rows);
    call.soft = per_row("soft", soft);
    call.hard = per_row("hard", hard);
    call.z2 = per_row("z2", z2);
    call.dsoft_dtemperature = per_row("dsoft_dtemperature", dsoft_dtemperature);
    call.c_soft = per_row("c_soft", c_soft);
    call.c_hard = per_row("c_hard", c_hard);
    call.c_z = per_row("c_z", c_z);
    call.logit_sum = per_row("logit_sum", logit_sum);
    if (values) call.values = values->values<float>("values", "float32", call.rows * call.values_per_row);
    call.values_with_dtemperature = values_with_dtemperature;
    if (observed) call.observed = observed->values<double>("observed", "float64", call.rows * call.observed_per_row);
    if (stats) call.stats = stats->values<float>("stats", "float32", call.rows * call.stats_per_row());
    if (grad) {
        call.grad = grad->rows("grad", leading, true);
        if (call.grad.columns != call.student.columns) throw ArgumentError("grad must have the student's columns");
    }
    const kdfast::cpu::Kernels& kernels = kdfast::cpu::kernels();
    const auto run = passes == "all"        ? kernels.forward
                     : passes == "gradient" ? kernels.backward
                     : passes == "sums"     ? kernels.sums
                     : passes == "values"   ? kernels.values
                                            : nullptr;
    if (!run) throw ArgumentError("passes must be all, sums, values or gradient, got " + passes);
    if (passes != "all" && !stats) throw ArgumentError("passes one by one need stats");
    if (passes == "gradient" && !grad) throw ArgumentError("the gradient needs grad");
    if (passes == "values" && !values) throw ArgumentError("the sums of pass 2 need values");

    const py::gil_scoped_release release;
    kdfast::cpu::run_apart(call, run);
}

void select_targets(const View& logits, const std::string& method, std::int64_t k, std::int64_t least, double p,
                    std::vector<double> temperatures, std::uint64_t seed, std::int64_t first_token, const View& ids,
                    const View& logprobs, const View& lse, const View& k_eff, const Optional& mass,
                    const Optional& neg_entropy, int threads) {
    kdfast::cpu::SelectCall call;
    if (logits.shape.empty()) throw ArgumentError("logits must be (..., V)");
    const std::vector<std::int64_t> leading(logits.shape.begin(), logits.shape.end() - 1);
    call.rows = 1;
    for (const std::int64_t s : leading) call.rows *= s;
    call.logits = logits.rows("logits", leading);
    const auto& known = kdfast::cpu::method_names;
    const auto found = std::find(known.begin(), known.end(), method);
    if (found == known.end()) throw ArgumentError("unknown method " + method);
    call.method = static_cast<kdfast::cpu::Method>(found - known.begin());
    call.k = k;
    call.least = least;
    call.p = p;
    call.temperatures = std::move(temperatures);
    call.seed = seed;
    call.first_token = first_token;
    call.ids = ids.values<std::int32_t>("ids", "int32", call.rows * k);
    call.logprobs = logprobs.values<float>("logprobs", "float32", call.rows * k);
    call.lse = lse.values<float>("lse", "float32", call.rows * static_cast<std::int64_t>(call.temperatures.size()));
    call.k_eff = k_eff.values<std::int32_t>("k_eff", "int32", call.rows);
    if (call.sampled() && (!mass || !neg_entropy)) throw ArgumentError("a sampled method needs mass and neg_entropy");
    if (mass) call.mass = mass->values<float>("mass", "float32", call.rows * k);
    if (neg_entropy) call.neg_entropy = neg_entropy->values<float>("neg_entropy", "float32", call.rows);
    call.threads = std::max(1, threads);
    const kdfast::cpu::SelectKernels& kernels = *kdfast::cpu::kernels().select;

    const py::gil_scoped_release release;
    kdfast::cpu::select(call, kernels);
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const auto& isa : kdfast::cpu::isa_table())
        if (isa.supported()) names.emplace_back(isa.name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Compiled core of kdfast; private, use the functions of the package.";
    py::class_<View>(m, "View", "A tensor: address, dtype, shape and strides in elements.")
        .def(py::init([](std::uintptr_t data, std::string dtype, std::vector<std::int64_t> shape,
                         std::vector<std::int64_t> strides, std::int64_t storage_bytes) {
                 return View{data, std::move(dtype), std::move(shape), std::move(strides), storage_bytes};
             }),
             py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("storage_bytes"));
    m.def("dense", &dense, py::kw_only(), py::arg("passes"), py::arg("student"), py::arg("teachers"),
          py::arg("teacher_weights") = py::none(), py::arg("labels") = py::none(), py::arg("counted") = py::none(),
          py::arg("temperature"), py::arg("names"), py::arg("weights"), py::arg("parameters"), py::arg("mix_logits"),
          py::arg("columns"), py::arg("label_smoothing"), py::arg("soft") = py::none(), py::arg("hard") = py::none(),
          py::arg("z2") = py::none(), py::arg("dsoft_dtemperature") = py::none(), py::arg("stats") = py::none(),
          py::arg("observed") = py::none(), py::arg("grad") = py::none(), py::arg("c_soft") = py::none(),
          py::arg("c_hard") = py::none(), py::arg("c_z") = py::none(), py::arg("logit_sum") = py::none(),
          py::arg("values") = py::none(), py::arg("values_with_dtemperature") = false, py::arg("kept_ids") = py::none(),
          py::arg("kept_values") = py::none(), py::arg("kept_per_row") = py::none(), py::arg("kept_columns") = 0,
          py::arg("tail_rule") = "", py::arg("scales") = std::vector<double>(),
          py::arg("softcaps") = std::vector<double>(), py::arg("threads"),
          "The dense distillation loss: forward, forward with gradient, or gradient from saved stats.");
    m.def("select", &select_targets, py::kw_only(), py::arg("logits"), py::arg("method"), py::arg("k"),
          py::arg("least"), py::arg("p"), py::arg("temperatures"), py::arg("seed"), py::arg("first_token"),
          py::arg("ids"), py::arg("logprobs"), py::arg("lse"), py::arg("k_eff"), py::arg("mass") = py::none(),
          py::arg("neg_entropy") = py::none(), py::arg("threads"), "Sparse targets from logits (..., V).");
    m.def(
        "scale",
        [](const View& data, double factor, int threads) {
            const std::vector<std::int64_t> leading(data.shape.begin(), data.shape.end() - 1);
            const Rows rows = data.rows("data", leading);
            const std::int64_t count = rows.columns ? data.count() / rows.columns : 0;
            const py::gil_scoped_release release;
            kdfast::cpu::kernels().scale(rows, count, static_cast<float>(factor), std::max(1, threads));
        },
        py::arg("data"), py::arg("factor"), py::arg("threads"), "Multiplies a tensor (..., V) by a number, in place.");
    m.def(
        "triad",
        [](const View& a, const View& b, const View& out, int threads) {
            const std::int64_t n = out.count();
            const auto *pa = a.values<float>("a", "float32", n), *pb = b.values<float>("b", "float32", n);
            auto* po = out.values<float>("out", "float32", n);
            const py::gil_scoped_release release;
            kdfast::cpu::kernels().triad(pa, pb, po, n, std::max(1, threads));
        },
        py::arg("a"), py::arg("b"), py::arg("out"), py::arg("threads"),
        "out = a + b with non-temporal stores: the bandwidth of two streams read and one written.");
    m.def(
        "advise_huge_pages",
        [](const View& data) {
            const std::size_t size = data.dtype == "float32" ? 4 : 2;
            kdfast::advise_huge_pages(reinterpret_cast<void*>(data.data),
                                      static_cast<std::size_t>(data.count()) * size);
        },
        py::arg("data"), "Asks for huge pages behind fresh, untouched memory.");
    m.def(
        "sort_rows",
        [](const View& x, const View& values, const Optional& order, int threads) {
            if (x.shape.size() != 2) throw ArgumentError("x must be (rows, columns)");
            const std::int64_t n = x.count();
            const auto* in = x.values<float>("x", "float32", n);
            auto* out = values.values<float>("values", "float32", n);
            auto* places = order ? order->values<std::int64_t>("order", "int64", n) : nullptr;
            const py::gil_scoped_release release;
            kdfast::cpu::sort_rows(in, x.shape[0], x.shape[1], out, places, std::max(1, threads));
        },
        py::arg("x"), py::arg("values"), py::arg("order"), py::arg("threads"),
        "Sorts each row descending, NaN first, equal values by column.");
    kdfast::bindings::add_cache(m);
    kdfast::bindings::add_packed(m);
    m.def("isa", [] { return std::string(kdfast::cpu::kernels().isa); }, "The instruction set in use.");
    m.def("supported_isas", &supported_isas, "Instruction sets that this CPU supports, best first.");
}
