"""``kdfast.report``: a student beside its teacher, measured."""

from __future__ import annotations

import html
import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdfast.methods.batch import Split, split_batch
from kdfast.reporting.calibration import BINS
from kdfast.reporting.compare import Comparison, evaluating
from kdfast.reporting.cost import latency, size
from kdfast.reporting.environment import environment
from kdfast.reporting.examples import Classes, Describe, shown
from kdfast.reporting.figures import comparisons, entropy_buckets, model_figures
from kdfast.reporting.measure import Measurement, Model, Role
from kdfast.reporting.outputs import check_folder
from kdfast.reporting.table import table
from kdfast.reporting.verdict import verdict

HTML_NAME = "report.html"
JSON_NAME = "report.json"
ROUNDS = 15


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        figures: everything, as in the JSON file; docs/report.md says what is where.
    """

    figures: dict[str, Any]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``report.html``, one file with everything in it, and ``report.json`` into a folder.

        Returns:
            The path of the page.

        Raises:
            ModuleNotFoundError: matplotlib or jinja2 is missing, which the extra ``kdfast[docs]`` brings.
        """
        page = self.html()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / JSON_NAME).write_text(self.json() + "\n", encoding="utf-8")
        (path / HTML_NAME).write_text(page, encoding="utf-8")
        return path / HTML_NAME

    def html(self) -> str:
        """The page.

        Raises:
            ModuleNotFoundError: as :meth:`save`.
        """
        _require_page()
        from kdfast.reporting.page import render

        return render(self.figures)

    def json(self) -> str:
        """The figures as JSON."""
        return json.dumps(self.figures, indent=1, allow_nan=False, ensure_ascii=False)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style stays its own."""
        page = html.escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 900px; border: 0"></iframe>'

    def __str__(self) -> str:
        students = [model["name"] for model in self.figures["models"] if model["role"] == "student"]
        return "\n".join([table(self.figures), "", *(verdict(self.figures, name) for name in students)])


def report(
    student: nn.Module | Mapping[str, nn.Module],
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    baseline: nn.Module | None = None,
    layers: Sequence[tuple[str, str]] | None = None,
    split: Split = split_batch,
    causal: bool = False,
    vocab: Literal["strict", "truncate"] = "strict",
    top_k: int = 5,
    examples: int = 10,
    describe: Describe | None = None,
    classes: Classes | None = None,
    rounds: int = ROUNDS,
    names: Mapping[str, str] | None = None,
    title: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Report:
    """Measures a student against its teacher and, where there is one, against a student that saw labels only.

    Task metric, agreement, KL by the teacher's entropy, calibration, errors inherited and corrected, the examples on
    which they are furthest apart, parameters, bytes on disk, latency, and CKA by layer. The loader is read once, by
    all models together, in eval mode and without gradient; modes are then as before and hooks are gone. Models of one
    prediction an example (logits (B, V)) are classifiers, those of several (B, S, V) language models.

    A position counts if its label is not -100, it is not padding (``attention_mask``, ``token_mask``) and its weight
    is not 0; weights are not used otherwise. About 20 bytes are kept of each position and model, and no logits.

    Args:
        student: called as ``student(*args, **kwargs)`` with the inputs of a batch, on its own device; or several, by
            name.
        teacher: likewise.
        loader: batches; see ``split``. Without labels, what needs them is not measured, and the report says so.
        baseline: a student that was trained on labels only.
        layers: pairs (student's layer, teacher's layer) of path patterns, see :mod:`kdfast.methods.layers`; None
            chooses up to eight of each model; () compares none.
        split: how a batch is split into inputs and labels.
        causal: logits at position i are compared with the label at i + 1.
        vocab: "truncate" compares models of different V over their common leading columns: KL and entropy are
            renormalised over these, the task's figures are of all.
        top_k: k of the top-k figures.
        examples: how many to show, at most, of each student.
        describe: of an example's input to a text, or to a tensor to draw. Token ids come as a list, without padding and
            up to the position in question: a tokenizer's ``decode`` does. By default ids and numbers are printed, and
            (C, H, W) and (H, W) inputs drawn.
        classes: names of the columns: a sequence, a mapping, or a function of the column; of a language model what
            ``describe`` makes of the one id by default.
        rounds: timed forward passes of each model, by turns; 0 measures no latency.
        names: what "student", "teacher" and "baseline" are called in the report.
        title: of the page.
        out: folder to write ``report.html`` and ``report.json`` into; None writes nothing.

    Returns:
        The figures, see :class:`Report`.

    Raises:
        TypeError: models that are no modules, or return no logits; labels that are no integers.
        ValueError: an empty loader, shapes, vocabularies or labels that do not fit, layers that are not there.
        ModuleNotFoundError: ``out`` is given, and matplotlib or jinja2 is missing.
        OSError: ``out`` cannot be written, which is found before the models run.

    Source:
        Stanton et al., "Does knowledge distillation really work?", arXiv 2106.05945 (agreement beside accuracy); Guo et
        al., arXiv 1706.04599 (calibration); Kornblith et al., arXiv 1905.00414 (CKA).

    Example:
        >>> import torch
        >>> loader = [(torch.randn(32, 3), torch.randint(5, (32,))) for _ in range(4)]
        >>> found = report(nn.Linear(3, 5), nn.Linear(3, 5), loader)
        >>> found.figures["data"]["positions"]
        128
    """
    _check(loader, layers, vocab=vocab, top_k=top_k, examples=examples, rounds=rounds)
    models = _models(student, teacher, baseline, names or {})
    if out is not None:
        _require_page()
        check_folder(out, "out", (HTML_NAME, JSON_NAME))
    measurement = Measurement(models, causal=causal, top_k=top_k, examples=examples, vocab=vocab)
    asked = None if layers is None else tuple((pair[0], pair[1]) for pair in layers)
    comparison = Comparison(models, split, asked, measurement)
    unmeasured: dict[str, str] = {}
    with evaluating([model.module for model in models]):
        observed = comparison.read(loader)
        assert comparison.first is not None  # there was a batch
        timed = latency(models, comparison.first, comparison.first_examples, rounds) if rounds else None
    if observed.labels is None:
        unmeasured["task metric, calibration and errors"] = "the loader gives no labels"
    if baseline is None:
        unmeasured["what distillation itself brought"] = "no label-only student was given (baseline=)"
    if comparison.similarity is None:
        unmeasured["similarity of representations"] = comparison.unmeasured
    if timed is None:
        unmeasured["latency"] = "rounds=0"
    if not examples:
        unmeasured["examples"] = "examples=0"
    figures = {
        "kind": "kdfast report",
        "title": title or f"{', '.join(m.name for m in models if m.role == 'student')} beside {models[0].name}",
        "task": "language model" if observed.sequences else "classifier",
        "data": {
            "batches": observed.batches,
            "examples": observed.examples,
            "positions": len(observed.example),
            "labelled": observed.labels is not None,
            "causal": causal,
        },
        "top_k": observed.top_k,
        "calibration_bins": BINS,
        "most_entropy": math.log(min(observed.classes.values())),
        "models": [model_figures(model, observed) | size(model.module) for model in models],
        "comparisons": comparisons(observed, models),
        "entropy_buckets": entropy_buckets(observed, models),
        "latency": timed,
        "similarity": comparison.similarity,
        "examples": {
            name: [shown(entry, describe, classes, observed.sequences) for entry in entries]
            for name, entries in observed.disagreements.items()
        },
        "not_measured": unmeasured,
        "environment": environment(),
    }
    found = Report(json.loads(json.dumps(figures, allow_nan=False)))
    if out is not None:
        found.save(out)
    return found


def _models(
    student: nn.Module | Mapping[str, nn.Module],
    teacher: nn.Module,
    baseline: nn.Module | None,
    names: Mapping[str, str],
) -> list[Model]:
    unknown = set(names) - {"student", "teacher", "baseline"}
    if unknown:
        msg = f'names must have the keys "student", "teacher" or "baseline", got {sorted(unknown)}'
        raise ValueError(msg)
    students = student if isinstance(student, Mapping) else {names.get("student", "student"): student}
    if not students:
        msg = "student is an empty mapping: give one student at least"
        raise ValueError(msg)
    given: list[tuple[str, Role, Any]] = [(names.get("teacher", "teacher"), "teacher", teacher)]
    given += [(name, "student", module) for name, module in students.items()]
    if baseline is not None:
        given.append((names.get("baseline", "labels only"), "baseline", baseline))
    for name, role, module in given:
        if not isinstance(module, nn.Module):
            what = "; a cached teacher has no logits but those it kept, give the model" if role == "teacher" else ""
            msg = f"{role} must be a torch.nn.Module, got {type(module).__name__}{what}"
            raise TypeError(msg)
        if not isinstance(name, str) or [other for other, *_ in given].count(name) > 1:
            msg = f"models must have names that differ, got {name!r} twice or as no text: pass names={{...}}"
            raise ValueError(msg)
    return [Model(name, role, module) for name, role, module in given]


def _check(loader: Any, layers: Any, *, vocab: str, top_k: int, examples: int, rounds: int) -> None:
    if not isinstance(loader, Iterable):
        msg = f"loader must give batches one by one, got {type(loader).__name__}"
        raise TypeError(msg)
    if vocab not in ("strict", "truncate"):
        msg = f'vocab must be "strict" or "truncate", got {vocab!r}'
        raise ValueError(msg)
    for name, value, least in (("top_k", top_k, 1), ("examples", examples, 0), ("rounds", rounds, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            msg = f"{name} must be an int of at least {least}, got {value!r}"
            raise ValueError(msg)
    if layers is not None:
        for pair in layers:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
                msg = f'layers must be pairs (student\'s layer, teacher\'s layer), as [("fc1", "fc2")], got {pair!r}'
                raise ValueError(msg)


def _require_page() -> None:
    for package in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            msg = f'a report\'s page needs {package}, which is not installed: pip install "kdfast[docs]"'
            raise ModuleNotFoundError(msg, name=package) from error
