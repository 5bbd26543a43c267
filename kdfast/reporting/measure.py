"""One pass over a loader by several models: what of each prediction is kept."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kdfast.methods.batch import Inputs
from kdfast.methods.positions import (
    arguments,
    documents,
    encoder_decoder,
    predicting,
    tokens_of_logits,
    warn_of_copies,
)
from kdfast.methods.step import IGNORED, logits_of
from kdfast.spec.head import LMHead

CHUNK = 2**24  # logits at a time, so that their fp32 copies stay small
SHOWN = 3  # predictions of a model for an example that is shown

Role = Literal["teacher", "student", "baseline"]


@dataclass(frozen=True)
class Model:
    """One of the models that a report is about."""

    name: str
    role: Role
    module: nn.Module

    @functools.cached_property
    def device(self) -> torch.device | None:
        """Of its parameters or buffers; None where it has none."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), None)

    def run(self, inputs: Inputs) -> Any:
        """What it returns for a batch, whose tensors are taken to its device."""
        return self.bound(inputs)()

    def bound(self, inputs: Inputs) -> Callable[[], Any]:
        """Its forward pass over a batch that is on its device already."""
        kwargs = arguments(self.module, inputs)
        args, kwargs = tree_map(self._moved, (inputs.args, kwargs))
        return lambda: self.module(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) and self.device is not None else value

    def logits(self, raw: Any) -> Tensor:
        """Its logits (..., V).

        Raises:
            TypeError: it returned none.
        """
        found = logits_of(raw)
        if isinstance(found, LMHead):
            found = found.logits()
        if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
            what = tuple(found.shape) if isinstance(found, Tensor) else type(raw).__name__
            msg = f"{self.name} must return logits (B, ..., V), or an object that has them in .logits; got {what}"
            raise TypeError(msg)
        return found


@dataclass
class Columns:
    """What is kept of one model's prediction at every position that counts, on the CPU."""

    top1: Tensor  # (N,) int32
    confidence: Tensor  # (N,) fp32, probability of the top-1 prediction
    nats: Tensor | None  # (N,) fp32, cross-entropy with the label
    label_in_top: Tensor | None  # (N,) bool, label among the top k
    kl: Tensor | None  # (N,) fp32, KL(teacher, model), nats; None for the teacher
    overlap: Tensor | None  # (N,) fp32, share of the teacher's top k among the model's


@dataclass(order=True)
class Disagreement:
    """One position, at which a model is far from the teacher."""

    kl: float
    number: int  # of the example in the loader; of equal ones the later is dropped first
    position: int = field(compare=False)
    entropy: float = field(compare=False)
    key: Any = field(compare=False)
    label: int | None = field(compare=False)
    predictions: dict[str, list[tuple[int, float]]] = field(compare=False)  # by model: column and probability
    x: Any = field(compare=False)  # the example's input


@dataclass
class Observed:
    """A loader as the models saw it; positions are those that count, in the loader's order.

    Attributes:
        example: (N,) int64, the number of the example that a position is of.
        labels: (N,) int64; None without labels.
        entropy: (N,) fp32, the teacher's, nats.
        models: by name.
        disagreements: by name of a model, largest KL first.
        examples: in the loader.
        batches: in the loader.
        sequences: whether an example has several positions.
        classes: V of each model.
        top_k: k.
    """

    example: Tensor
    labels: Tensor | None
    entropy: Tensor
    models: dict[str, Columns]
    disagreements: dict[str, list[Disagreement]]
    examples: int
    batches: int
    sequences: bool
    classes: dict[str, int]
    top_k: int


class Measurement:
    """Gathers an :class:`Observed`, batch by batch.

    Args:
        models: the teacher first.
        causal: logits at position i are compared with the label at i + 1.
        top_k: k; of fewer columns, all.
        examples: how many disagreements are kept of each model.
        vocab: "truncate" compares models of different V over their common leading columns.
    """

    def __init__(self, models: Sequence[Model], *, causal: bool, top_k: int, examples: int, vocab: str) -> None:
        self.models = models
        self.causal = causal
        self.top_k = top_k
        self.kept = examples
        self.vocab = vocab
        self.examples = 0
        self.batches = 0
        self.classes: dict[str, int] = {}
        self._labelled: bool | None = None
        self._sequences: bool | None = None
        self._example: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._entropy: list[Tensor] = []
        self._columns: dict[str, dict[str, list[Tensor]]] = {model.name: {} for model in models}
        self._heaps: dict[str, list[tuple[float, int, Disagreement]]] = {m.name: [] for m in models[1:]}

    def add(self, inputs: Inputs, logits: Sequence[Tensor]) -> None:
        """Takes one batch.

        Args:
            inputs: the batch, split.
            logits: (B, ..., V) of each model.

        Raises:
            TypeError: labels that are no integers.
            ValueError: shapes or vocabularies that do not fit, a label out of range, logits that are NaN.
        """
        if self._labelled is None and not self.causal:  # the first one
            warn_of_copies(inputs, stacklevel=3)
        self._check(logits)
        device = logits[0].device
        places = logits[0].shape[:-1]
        labels = self._check_labels(inputs.labels, places)
        counts = positions(inputs, places, labels, causal=self.causal, model=self.models[0].module)
        kept = counts.flatten().nonzero()[:, 0]
        flat = [z.reshape(-1, z.shape[-1]) for z in logits]
        per_example = max(1, places[1:].numel())
        wanted = None
        if labels is not None:
            wanted = labels.flatten()[(kept + int(self.causal)).to(labels.device)].cpu()
            self._check_range(wanted)
            self._labels.append(wanted)
        common = min(self.classes.values())
        k = min(self.top_k, common)
        found: list[dict[str, list[Tensor]]] = [{} for _ in self.models]
        entropies = []
        for part in torch.split(torch.arange(len(kept), device="cpu"), max(1, CHUNK // max(self.classes.values()))):
            rows = kept[part]
            gold = None if wanted is None else wanted[part].to(device)[:, None]
            reference: tuple[Tensor, Tensor, Tensor] | None = None
            for model, z, columns in zip(self.models, flat, found, strict=True):
                mine = _rows(z, rows, device)
                log_p = mine.log_softmax(-1)
                if bool(log_p.isnan().any()):
                    msg = f"{model.name} has logits that are NaN, or rows of -inf alone: there is nothing to report on"
                    raise ValueError(msg)
                top = log_p.topk(k)
                values = {"top1": top.indices[:, 0].int(), "confidence": top.values[:, 0].exp().float()}
                if gold is not None:
                    values["nats"] = -log_p.gather(-1, gold)[:, 0].float()
                    values["label_in_top"] = (top.indices == gold).any(-1)
                if mine.shape[-1] > common:
                    log_p = mine[:, :common].log_softmax(-1)
                if reference is None:
                    q = log_p.exp()
                    reference = log_p, q, top.indices
                    entropies.append(torch.special.entr(q).sum(-1).float().cpu())
                else:
                    log_q, q, first = reference
                    # 0 log 0 = 0; below 0 (Gibbs) is rounding
                    kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1).clamp(min=0)
                    values["kl"] = kl.float()
                    values["overlap"] = (top.indices[:, :, None] == first[:, None, :]).any(-1).sum(-1) / k
                for name, value in values.items():
                    columns.setdefault(name, []).append(value.cpu())
        entropy = torch.cat(entropies)
        self._entropy.append(entropy)
        self._example.append(self.examples + kept // per_example)
        for model, columns in zip(self.models, found, strict=True):
            for name, parts in columns.items():
                self._columns[model.name].setdefault(name, []).append(torch.cat(parts))
        for model, columns in zip(self.models[1:], found[1:], strict=True):
            if len(kept) and self.kept:
                kl = torch.cat(columns["kl"])
                self._disagree(model.name, kl, entropy, kept, per_example, wanted, inputs, flat)
        self.examples += places[0]
        self.batches += 1

    def observed(self) -> Observed:
        """What was gathered.

        Raises:
            ValueError: no position counts.
        """
        if not self.batches or not sum(len(part) for part in self._example):
            what = "has no batch" if not self.batches else "has no position whose label is not -100"
            msg = f"loader {what}: a report needs one at least"
            raise ValueError(msg)
        joined = {name: {c: torch.cat(v) for c, v in columns.items()} for name, columns in self._columns.items()}
        return Observed(
            example=torch.cat(self._example),
            labels=torch.cat(self._labels).long() if self._labelled else None,
            entropy=torch.cat(self._entropy),
            models={
                name: Columns(
                    columns["top1"],
                    columns["confidence"],
                    columns.get("nats"),
                    columns.get("label_in_top"),
                    columns.get("kl"),
                    columns.get("overlap"),
                )
                for name, columns in joined.items()
            },
            disagreements={
                name: [entry for _, _, entry in sorted(heap, key=lambda item: (-item[0], -item[1]))]
                for name, heap in self._heaps.items()
            },
            examples=self.examples,
            batches=self.batches,
            sequences=bool(self._sequences),
            classes=self.classes,
            top_k=min(self.top_k, *self.classes.values()),
        )

    def _check(self, logits: Sequence[Tensor]) -> None:
        reference = logits[0]
        for model, z in zip(self.models, logits, strict=True):
            if z.shape[:-1] != reference.shape[:-1]:
                msg = (
                    f"{model.name} and {self.models[0].name} must have logits of the same shape but for V, got "
                    f"{tuple(z.shape)} and {tuple(reference.shape)}"
                )
                raise ValueError(msg)
            if self.classes.setdefault(model.name, z.shape[-1]) != z.shape[-1]:
                msg = f"{model.name} has {z.shape[-1]} columns, and had {self.classes[model.name]} before"
                raise ValueError(msg)
            if z.shape[-1] != reference.shape[-1] and self.vocab == "strict":
                msg = (
                    f"{model.name} has {z.shape[-1]} columns, {self.models[0].name} {reference.shape[-1]}: pass "
                    f'vocab="truncate" to compare them over the first {min(z.shape[-1], reference.shape[-1])}'
                )
                raise ValueError(msg)
        sequences = reference.dim() > 2
        if self.causal and reference.dim() != 3:
            msg = f"causal=True is for logits (B, S, V), got {tuple(reference.shape)}"
            raise ValueError(msg)
        if self._sequences is None:
            self._sequences = sequences

    def _check_labels(self, labels: Tensor | None, places: torch.Size) -> Tensor | None:
        if self._labelled is None:
            self._labelled = labels is not None
        if (labels is not None) != self._labelled:
            msg = "some batches have labels and some have none: give all of them labels, or none"
            raise ValueError(msg)
        if labels is None:
            return None
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            msg = f"labels must be an int64 tensor of class numbers, got {what}"
            raise TypeError(msg)
        if labels.shape != places:
            msg = f"labels must have the shape of the logits but for V, {tuple(places)}, got {tuple(labels.shape)}"
            raise ValueError(msg)
        return labels

    def _check_range(self, labels: Tensor) -> None:
        columns = min(self.classes.values())
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= columns):
            msg = f"labels must be 0 to {columns - 1}, or -100, got {int(labels.min())} to {int(labels.max())}"
            raise ValueError(msg)

    def _disagree(
        self,
        name: str,
        kl: Tensor,
        entropy: Tensor,
        kept: Tensor,
        per_example: int,
        labels: Tensor | None,
        inputs: Inputs,
        flat: Sequence[Tensor],
    ) -> None:
        """Keeps of every example the position of its largest KL, if that is among the largest so far."""
        heap = self._heaps[name]
        seen: set[int] = set()
        for at in torch.argsort(kl, descending=True, stable=True).tolist():
            place = int(kept[at])
            b = place // per_example
            if b in seen:
                continue
            seen.add(b)
            value, number = kl[at].item(), self.examples + b
            if len(heap) == self.kept and (value, -number) <= heap[0][:2]:
                break  # and so are all after it
            entry = Disagreement(
                kl=value,
                number=number,
                position=place % per_example,
                entropy=entropy[at].item(),
                key=_key(inputs, b),
                label=None if labels is None else int(labels[at]),
                predictions={m.name: _best(z[place]) for m, z in zip(self.models, flat, strict=True)},
                x=_input(inputs, b, place % per_example if self._sequences else None),
            )
            item = (value, -number, entry)
            heapq.heappushpop(heap, item) if len(heap) == self.kept else heapq.heappush(heap, item)
            if len(seen) in (self.kept, len(flat[0]) // per_example):
                break


def positions(inputs: Inputs, places: torch.Size, labels: Tensor | None, *, causal: bool, model: nn.Module) -> Tensor:
    """Which positions count, see :mod:`kdfast.methods.positions`, and have a weight that is not 0.

    Args:
        inputs: the batch.
        places: shape of the logits but for V.
        labels: of that shape, or None.
        causal: the last position predicts nothing, and every other one counts if the one after it does.
        model: whose logits they are.

    Returns:
        (B, ...) bool on the CPU.
    """
    cpu = torch.device("cpu")
    tokens = tokens_of_logits(inputs, two_sided=encoder_decoder(model, inputs))
    counts = predicting(places, tokens, documents(inputs.positions), causal=causal, device=cpu)
    if counts is None:
        counts = torch.ones(places, dtype=torch.bool, device=cpu)
    for tensor, dropped in ((labels, IGNORED), (inputs.weights, 0)):
        if isinstance(tensor, Tensor) and tensor.shape == places:
            kept = (tensor != dropped).cpu()
            counts &= torch.nn.functional.pad(kept[:, 1:], (0, 1), value=False) if causal else kept
    return counts


def _rows(z: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Some rows of the logits, in fp32 (fp64 stays)."""
    taken = z.index_select(0, rows.to(z.device)).to(device)
    return taken if taken.dtype == torch.float64 else taken.float()


def _best(z: Tensor) -> list[tuple[int, float]]:
    p = (z if z.dtype == torch.float64 else z.float()).softmax(-1)
    top = p.topk(min(SHOWN, len(p)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _key(inputs: Inputs, b: int) -> Any:
    """What the loader calls the example, if it says so."""
    for given in (inputs.keys, inputs.index):
        if given is not None:
            key = given[b]
            return key.item() if isinstance(key, Tensor) else key
    return None


def _input(inputs: Inputs, b: int, position: int | None) -> Tensor | None:
    """The first tensor of an example's inputs; of token ids those up to a position, without padding."""
    named = [inputs.kwargs[n] for n in ("input_ids", "pixel_values") if n in inputs.kwargs]
    x = next((v for v in (*inputs.args, *named, *inputs.kwargs.values()) if isinstance(v, Tensor)), None)
    if x is None or x.dim() == 0 or len(x) <= b:
        return None
    one = x[b].detach().cpu()
    if one.dim() == 1 and not one.is_floating_point():
        real = torch.ones(len(one), dtype=torch.bool, device="cpu")
        mask = inputs.token_mask if inputs.mask is None else inputs.mask
        if mask is not None and mask.shape == x.shape:
            real = mask[b].bool().cpu()
        end = len(one) if position is None else position + 1
        one = one[:end][real[:end]]
    return one.clone()
