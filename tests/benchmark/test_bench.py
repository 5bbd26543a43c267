"""`kdfast bench`: what it measures is checked, what it writes is read back, its gate opens and shuts. No timings."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("rich", reason="the bench extra is not installed")

import typer

import kdfast
from kdfast.benchmark import cases, competitors, measure, process, results
from kdfast.benchmark.cases import Case
from kdfast.benchmark.compare import better, compare
from kdfast.benchmark.errors import BenchError, WrongResultError
from kdfast.benchmark.machine import Machine
from kdfast.benchmark.results import CaseResult, Run, Timing
from kdfast.cli.bench import bench

TINY = Case("forward_kl", 16, 1000, "fp32")
FAST = ["--competitor", "eager", "--competitor", "kdfast*", "--competitor", "triad"]  # no compiler


@pytest.fixture
def kdfast_bench(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and all that it printed."""
    monkeypatch.setenv("NO_COLOR", "1")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench)

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            app([str(a) for a in arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out + printed.err

    return call


def timing(*rounds_ms, **other):
    return Timing(list(rounds_ms), **{"page_faults": 3.0, "peak_bytes": 4096, "first_step_s": 0.5} | other)


def write(path, ratio, case=TINY, machine=None):
    """A run in which kdfast is ``ratio`` times as fast as eager."""
    timings = {"kdfast": timing(1.0, 2.0, 1.0), "eager": timing(ratio, 2 * ratio, ratio)}
    run = Run(machine or Machine.here(), "2026-01-01T00:00:00+00:00", {case.name: CaseResult(case, timings)})
    path.write_text(run.to_json())
    return path


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """JSON and Markdown of a run of two tiny cases, and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench)
    arguments = ["--case", TINY.name, "--case", "jsd-8x1000-bf16", *FAST, "--rounds", "2", "--isa", "generic"]
    files = {"--json": folder / "run.json", "--markdown": folder / "run.md"}
    with pytest.raises(SystemExit) as caught:
        app(arguments + [str(word) for pair in files.items() for word in pair])
    assert caught.value.code == 0
    return files["--json"], files["--markdown"]


NAMES = {"kdfast", "kdfast-overwrite", "eager", "triad", "kdfast[generic]", "kdfast-overwrite[generic]"}


def test_json_holds_what_the_document_says(measured):
    data = json.loads(measured[0].read_text())
    assert (data["schema"], data["version"]) == ("kdfast-bench", 1)
    assert data["options"] == {"temperature": 2.0, "alpha": 0.5}
    assert set(data["machine"]) == {field.name for field in dataclasses.fields(Machine)}
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert list(data["cases"]) == [TINY.name, "jsd-8x1000-bf16"]
    entry = data["cases"][TINY.name]
    assert {"divergence", "rows", "vocab", "dtype", "floor_bytes", "timings", "ratios", "skipped"} == set(entry)
    assert entry["floor_bytes"] == 16 * 1000 * 12
    assert set(entry["timings"]) == NAMES
    assert set(entry["ratios"]) == {name for name in NAMES if name.startswith("kdfast")}
    for values in entry["timings"].values():
        assert len(values["rounds_ms"]) == 2
        assert values["ms"] > 0
        assert values["gb_per_s"] > 0
        assert values["first_step_s"] > 0
    assert set(entry["ratios"]["kdfast"]) == {"eager", "triad"}
    assert entry["skipped"] == {}


def test_json_is_read_back(measured):
    assert Run.read(measured[0]).to_json() + "\n" == measured[0].read_text()


def test_markdown_names_machine_and_every_case(measured):
    text = measured[1].read_text()
    assert str(Machine.here()).partition(";")[0] in text
    assert text.count(TINY.name) == 2  # a line in the summary and a table of its own
    assert "| kdfast-overwrite[generic] |" in text


@pytest.mark.parametrize("divergence", cases.DIVERGENCES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_formula_agrees_with_kdfast(divergence, dtype):
    chosen = competitors.select(["eager", "kdfast*"])
    result = measure.measure(Case(divergence, 8, 1003, dtype), chosen, rounds=1)
    assert set(result.timings) == {"kdfast", "kdfast-overwrite", "eager"}


def test_the_compiled_competitor_is_measured_or_says_why_not():
    result = measure.measure(TINY, competitors.select(["torch.compile"]), rounds=1)
    assert ("torch.compile" in result.timings) != ("torch.compile" in result.skipped)


def test_a_competitor_that_cannot_compile_is_left_out_with_the_reason():
    def build(work):
        msg = "no compiler\nand a long trace"
        raise RuntimeError(msg)

    chosen = [*competitors.select(["eager"]), competitors.Competitor("torch.compile", build, optional=True)]
    result = measure.measure(TINY, chosen, rounds=1)
    assert result.skipped == {"torch.compile": "RuntimeError: no compiler"}
    assert set(result.timings) == {"kdfast", "eager"}


@pytest.mark.parametrize("only", [["kdfast"], ["eager", "kdfast*"]])
def test_a_wrong_gradient_is_refused_even_where_eager_is_not_measured(monkeypatch, kdfast_bench, only):
    right = competitors.SOFT_TERMS["forward_kl"]
    monkeypatch.setitem(competitors.SOFT_TERMS, "forward_kl", lambda p, q: right(p, q) + 0.001 * p[3, 5])
    asked = [word for name in only for word in ("--competitor", name)]
    code, printed = kdfast_bench("--case", TINY.name, "--rounds", 1, *asked)
    assert code == 1
    assert "do not compute the same" in printed


def test_a_nan_is_no_agreement():
    loss, gradient = torch.tensor(1.0), torch.ones(2, 3)
    measure.check_same(TINY, "x", (loss, gradient), (loss, gradient))
    for bad in [(torch.tensor(float("nan")), gradient), (loss, gradient * float("nan"))]:
        with pytest.raises(WrongResultError, match="x and kdfast"):
            measure.check_same(TINY, "x", bad, (loss, gradient))


def test_the_gradient_is_fresh_and_the_logits_are_brought_back():
    work = competitors.Workload(TINY)
    default, overwriting = (c.build(work) for c in competitors.COMPETITORS[:2])
    before = work.student.detach().clone()
    losses = []
    for step in (default, overwriting, overwriting, default):
        step.prepare()
        assert default.gradient() is None or step is overwriting
        losses.append(step.run().item())
    assert len(set(losses)) == 1
    assert torch.equal(work.student, before)
    assert overwriting.gradient().data_ptr() == work.scratch.data_ptr()


def test_peak_memory_is_that_of_the_step():
    held = []
    peak = process.peak_extra_bytes(lambda: held.append(torch.ones(2**24)))
    if peak is None:
        pytest.skip("not measurable on this system")
    assert 0.9 * 2**26 < peak < 1.2 * 2**26 + 2**23


def test_page_faults_are_counted():
    before = process.minor_page_faults()
    if before is None:
        pytest.skip("not counted on this system")
    held = torch.ones(2**24)
    assert process.minor_page_faults() - before >= held.nbytes // 2**21  # huge pages at the largest


# --- Cases and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*cases.FULL, *cases.QUICK], ids=lambda case: case.name)
def test_names_are_read_back(case):
    assert Case.parse(case.name) == case


def test_the_declared_cases_stay_within_memory():
    assert all(case.rows * case.vocab <= 80e6 for case in cases.FULL)
    assert {case.vocab for case in cases.FULL} >= {1000, 32000, 50257, 128256, 151643, 151936}
    assert set(cases.DIVERGENCES) == set(competitors.SOFT_TERMS)


def test_selection_by_glob_and_by_name():
    assert cases.select([], quick=True) == list(cases.QUICK)
    assert {case.vocab for case in cases.select(["*x128256-*"], quick=False)} == {128256}
    assert cases.select(["jsd-3x7-bf16", "jsd-3x7-bf16"], quick=False) == [Case("jsd", 3, 7, "bf16")]


def test_list_measures_nothing(kdfast_bench, monkeypatch):
    monkeypatch.setattr(measure, "measure", None)
    code, printed = kdfast_bench("--list", "--quick")
    assert code == 0
    assert all(case.name in printed for case in cases.QUICK)
    assert all(competitor.name in printed for competitor in competitors.COMPETITORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "tvd-4x4-fp32"], "not a case"),
        (["--case", "nothing*"], "no case matches"),
        (["--competitor", "liger"], "none matches"),
        (["--isa", "mmx"], "this machine runs"),
        (["--json", "/no/such/folder/run.json"], "no folder"),
        (["--fail-below", "0.9"], "need --compare"),
        (["--with", "b.json"], "need --compare"),
        (["--compare", "a.json", "--gate", "triad"], "needs --fail-below"),
        (["--compare", "a.json", "--fail-below", "0"], "positive"),
        (["--compare", "a.json", "--fail-below", "0.9", "--gate", "liger"], "--gate must be one of"),
        (["--compare", "/no/such/base.json"], "cannot be read"),
    ],
)
def test_wrong_use_is_told_and_exits_2(kdfast_bench, arguments, message):
    code, printed = kdfast_bench(*arguments)
    assert code == 2
    assert message in printed


def test_without_the_kernel_there_is_nothing_to_measure(kdfast_bench, monkeypatch):
    monkeypatch.delattr(kdfast, "_core")
    monkeypatch.setitem(sys.modules, "kdfast._core", None)
    code, printed = kdfast_bench("--quick")
    assert code == 2
    assert "compiled kernel is missing" in printed


# --- Comparing --------------------------------------------------------------------------------------------------------


def test_a_file_passes_against_itself(kdfast_bench, measured):
    gates = ["--gate", "eager", "--gate", "triad"]
    code, printed = kdfast_bench("--compare", measured[0], "--with", measured[0], "--fail-below", 1, *gates)
    assert code == 0
    assert "no regression: 16 gated ratios" in printed  # 2 cases, 4 variants, 2 gates


def test_without_a_limit_nothing_fails(kdfast_bench, tmp_path):
    code, printed = kdfast_bench("--compare", write(tmp_path / "a", 100), "--with", write(tmp_path / "b", 1))
    assert code == 0
    assert "0.010" in printed


@pytest.mark.parametrize(("share", "code"), [(0.89, 1), (0.91, 0), (3.0, 0)])
def test_the_limit_is_a_share_of_the_base(kdfast_bench, tmp_path, share, code):
    base, new = write(tmp_path / "a.json", 10), write(tmp_path / "b.json", 10 * share)
    got, printed = kdfast_bench("--compare", base, "--with", new, "--fail-below", 0.9)
    assert got == code
    assert ("FAIL " + TINY.name in printed) == bool(code)


def test_a_run_fails_against_a_base_out_of_reach(kdfast_bench, measured, tmp_path):
    data = json.loads(measured[0].read_text())
    for entry in data["cases"].values():
        for name, values in entry["timings"].items():
            if name.startswith("kdfast"):
                values["rounds_ms"] = [ms / 1e6 for ms in values["rounds_ms"]]  # no noise makes up for that
    base = tmp_path / "base.json"
    base.write_text(json.dumps(data))
    code, printed = kdfast_bench(
        "--compare", base, "--fail-below", 0.9, "--case", TINY.name, "--rounds", 1, "--competitor", "eager"
    )
    assert code == 1
    assert "measuring it once more" in printed
    assert f"FAIL {TINY.name}: kdfast" in printed


def test_a_run_takes_the_cases_of_its_base(kdfast_bench, tmp_path):
    out = tmp_path / "new.json"
    base = write(tmp_path / "base.json", 1e-6)
    code, _ = kdfast_bench("--compare", base, "--fail-below", 0.9, "--rounds", 1, *FAST, "--json", out)
    assert code == 0
    assert list(Run.read(out).cases) == [TINY.name]


def test_a_second_measurement_that_passes_is_enough(tmp_path):
    base, slow, fine = (Run.read(write(tmp_path / str(ratio), ratio)) for ratio in (10, 5, 9.5))
    rows = better(compare(base, slow), compare(base, fine))
    assert [row.new for row in rows] == [9.5]
    assert [row.new for row in better(rows, compare(base, slow))] == [9.5]


def test_one_disturbed_measure_fails_no_gate(kdfast_bench, tmp_path):
    def result(*kdfast_ms):
        return CaseResult(TINY, {"kdfast": timing(*kdfast_ms), "eager": timing(10.0, 10.0, 10.0)})

    def file(name, *kdfast_ms):
        run = Run(Machine.here(), "2026-01-01T00:00:00+00:00", {TINY.name: result(*kdfast_ms)})
        (tmp_path / name).write_text(run.to_json())
        return tmp_path / name

    base = file("base", 1.0, 1.0, 1.0)
    for name, rounds_ms, expected in [
        ("busy", (1.0, 5.0, 5.0), 0),  # as fast as before in the one round that nobody disturbed
        ("lucky base", (1.2, 1.05, 1.05), 0),
        ("slower", (1.3, 1.25, 5.0), 1),
    ]:
        code, printed = kdfast_bench("--compare", base, "--with", file(name, *rounds_ms), "--fail-below", 0.9)
        assert code == expected, printed


def test_another_machine_is_said_to_be_one(kdfast_bench, tmp_path):
    other = dataclasses.replace(Machine.here(), cpu="abacus", commit="f00")
    base, new = write(tmp_path / "a.json", 10, machine=other), write(tmp_path / "b.json", 10)
    code, printed = kdfast_bench("--compare", base, "--with", new, "--fail-below", 0.9)
    assert code == 0
    assert "cpu: abacus, then" in printed
    assert "f00" not in printed


def test_ratios_are_taken_within_a_round():
    timings = {
        "kdfast": timing(1.0, 10.0, 100.0),
        "eager": timing(30.0, 300.0, 2900.0),
        "triad": timing(0.5, 5.0, 51.0),
    }
    result = CaseResult(TINY, timings)
    assert result.ratio("kdfast", "eager") == 30
    assert result.ratio("kdfast", "triad") == 0.5
    assert result.ratio("kdfast", "torch.compile") is None
    assert result.gb_per_s("kdfast") == pytest.approx(16 * 1000 * 12 / 10e-3 / 1e9)


def _edited(change):
    def edit(path: Path) -> None:
        data = json.loads(write(path, 10).read_text())
        change(data, data["cases"][TINY.name])
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text("{"), "cannot be read as JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
        (lambda path: path.write_text("[1, 2]"), "not a result of kdfast bench"),
        (_edited(lambda data, entry: data.update(version=99)), "version 99"),
        (_edited(lambda data, entry: data["options"].update(alpha=0.9)), "other options"),
        (_edited(lambda data, entry: data["machine"].pop("cpu")), "damaged"),
        (_edited(lambda data, entry: data.update(cases=[1])), "damaged"),
        (_edited(lambda data, entry: entry["timings"]["eager"].update(rounds_ms=[])), "damaged"),
        (_edited(lambda data, entry: entry["timings"]["eager"].update(rounds_ms=[0.0, 1.0, 1.0])), "damaged"),
        (_edited(lambda data, entry: entry["timings"].pop("eager")), "no ratio in common"),
        (lambda path: write(path, 10, Case("jsd", 2, 2, "fp32")), "no ratio in common"),
    ],
)
@pytest.mark.parametrize("side", ["base", "new"])
def test_unusable_files_exit_2(kdfast_bench, tmp_path, spoil, message, side):
    files = {name: write(tmp_path / f"{name}.json", 10) for name in ("base", "new")}
    spoil(files[side])
    code, printed = kdfast_bench("--compare", files["base"], "--with", files["new"], "--fail-below", 0.9)
    assert code == 2
    assert message in printed


def test_a_base_without_the_selected_cases_exits_2_before_measuring(kdfast_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", None)
    code, printed = kdfast_bench("--compare", write(tmp_path / "base.json", 10), "--quick", "--fail-below", 0.9)
    assert code == 2
    assert "none of the selected cases" in printed


def test_a_gate_that_would_check_nothing_exits_2(kdfast_bench, tmp_path):
    base, new = write(tmp_path / "a.json", 10), write(tmp_path / "b.json", 10)
    code, printed = kdfast_bench("--compare", base, "--with", new, "--fail-below", 0.9, "--gate", "triad")
    assert code == 2
    assert "would check nothing" in printed


def test_the_reader_raises_its_own_error(tmp_path):
    with pytest.raises(BenchError, match=r"missing\.json"):
        results.Run.read(tmp_path / "missing.json")
