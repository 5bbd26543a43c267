"""The pass over the loader that a report is made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.methods.batch import Inputs, Split
from kdfast.reporting.layers import Layers, as_rows, chosen, expanded
from kdfast.reporting.measure import Measurement, Model, Observed, positions
from kdfast.reporting.similarity import MiniBatchCKA

MOST_ROWS = 4096  # that CKA is computed from


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in eval mode and no gradient, then their modes as before."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class Comparison:
    """One pass by all models, and what is taken from it.

    Args:
        models: the teacher first.
        split: of a batch.
        layers: pairs of patterns (of the other models, of the teacher); None chooses some; empty: none.
        measurement: receives inputs and logits.

    Attributes:
        first: the first batch, split.
        first_examples: examples in it.
        similarity: what CKA found, see :meth:`_similarity`; None where ``unmeasured`` says why.
        unmeasured: why there is no CKA.
    """

    def __init__(
        self,
        models: Sequence[Model],
        split: Split,
        layers: Sequence[tuple[str, str]] | None,
        measurement: Measurement,
    ) -> None:
        self.models = models
        self.split = split
        self.layers = layers
        self.measurement = measurement
        self.first: Inputs | None = None
        self.first_examples = 0
        self.similarity: dict[str, Any] | None = None
        self.unmeasured = "layers=() asks for none" if layers == () else ""
        self._cka: MiniBatchCKA | None = None
        self._hooks: list[Layers] = []
        self._row = "example"

    def read(self, loader: Iterable[Any]) -> Observed:
        """Goes through the loader once.

        Raises:
            ValueError, TypeError: see :class:`Measurement`; layers that are not there or have no examples.
        """
        hooks: list[Layers] = []
        try:
            if self.layers:  # a wrong name is told before anything runs
                hooks = self._hooked([self._patterns(model) for model in self.models])
            for batch in loader:
                inputs = self.split(batch)
                if self.first is None:
                    self.first = inputs
                    if self.layers is None:
                        hooks = self._chosen(inputs)
                logits = [model.logits(model.run(inputs)) for model in self.models]
                self.first_examples = self.first_examples or len(logits[0])
                self.measurement.add(inputs, logits)
                if hooks:
                    self._compare(hooks, inputs, logits[0])
                    if self._cka is not None and self._cka.rows >= MOST_ROWS:
                        hooks = self._removed(hooks)
            observed = self.measurement.observed()
            if self._cka is not None:
                self._cka.flush()
                self.similarity = self._similarity(self._cka)
            return observed
        finally:
            self._removed(hooks)

    def _patterns(self, model: Model) -> list[str]:
        which = 1 if model.role == "teacher" else 0
        return expanded(model.module, [pair[which] for pair in self.layers or ()], model.name)

    def _chosen(self, inputs: Inputs) -> list[Layers]:
        examples = len(self.models[0].logits(self.models[0].run(inputs)))
        patterns = [chosen(m.module, lambda m=m: m.run(inputs), examples) for m in self.models]  # type: ignore[misc]
        for model, found in zip(self.models, patterns, strict=True):
            if not found:
                self.unmeasured = (
                    f"no layer of {model.name} whose output has the examples as its first dimension was seen to run: "
                    "name some with layers=, and compile models after the report, not before"
                )
                return []
        return self._hooked(patterns)

    def _hooked(self, patterns: Sequence[Sequence[str]]) -> list[Layers]:
        hooks: list[Layers] = []
        try:
            for model, names in zip(self.models, patterns, strict=True):
                hooks.append(Layers(model.module, names, model.name))
        except BaseException:
            self._removed(hooks)
            raise
        self._hooks = hooks
        return hooks

    def _removed(self, hooks: Sequence[Layers]) -> list[Layers]:
        for layers in hooks:
            layers.remove()
        return []

    def _compare(self, hooks: Sequence[Layers], inputs: Inputs, logits: Tensor) -> None:
        places = logits.shape[:-1]
        tensors = [layers.take(len(logits)) for layers in hooks]
        counts = positions(inputs, places, None, causal=False, model=self.models[0].module)
        rows, by_position = as_rows(tensors, places, counts)
        others = {model.name: x for model, x in zip(self.models[1:], rows[1:], strict=True)}
        if self._cka is None:
            names = [[name for found in layers.names.values() for name in found] for layers in hooks]
            self._cka = MiniBatchCKA(names[0], {m.name: n for m, n in zip(self.models[1:], names[1:], strict=True)})
            self._row = "position" if by_position else "example"
        self._cka.add(rows[0], others)

    def _similarity(self, cka: MiniBatchCKA) -> dict[str, Any] | None:
        """CKA of every layer of a model (rows) with every one of the teacher (columns), and the pairs asked for.

        Where no pair was asked for, each layer is paired with the teacher's that is most like it.
        """
        if not cka.rows:
            self.unmeasured = f"CKA needs four rows at least: the loader has fewer {self._row}s"
            return None
        found: dict[str, Any] = {}
        for model, hooks in zip(self.models[1:], self._hooks[1:], strict=True):
            table = cka.values(model.name)
            mine = cka.others[model.name]
            if self.layers:
                pairs = self._asked(model, hooks)
            else:
                known = [[-2.0 if value is None else value for value in row] for row in table]
                pairs = [(a, cka.teacher[row.index(max(row))]) for a, row in zip(mine, known, strict=True)]
            found[model.name] = {
                "layers": list(mine),
                "cka": table,
                "pairs": [
                    {"layer": a, "teacher_layer": b, "cka": table[mine.index(a)][cka.teacher.index(b)]}
                    for a, b in pairs
                ],
            }
        return {
            "row": self._row,
            "rows": cka.rows,
            "blocks": cka.blocks,
            "chosen": not self.layers,
            "teacher_layers": list(cka.teacher),
            "models": found,
        }

    def _asked(self, model: Model, hooks: Layers) -> list[tuple[str, str]]:
        """Layers of the pairs of patterns: one by one where both sides have as many, else each with each."""
        pairs: list[tuple[str, str]] = []
        for own, other in self.layers or ():
            mine = [n for p in expanded(model.module, [own], model.name) for n in hooks.names[p]]
            teacher = self.models[0]
            theirs = [n for p in expanded(teacher.module, [other], teacher.name) for n in self._hooks[0].names[p]]
            same = len(mine) == len(theirs)
            pairs += zip(mine, theirs, strict=True) if same else [(a, b) for a in mine for b in theirs]
        return pairs
