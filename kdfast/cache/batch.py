"""The targets that one call reads: few tensors, of which each sample has a part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdfast.spec.sparse import SAMPLED, SparseTargets

if TYPE_CHECKING:
    from kdfast import _core

#: K, the method, whether ragged and with gold, the samples' places in the order asked for, and the tokens of each.
Group: TypeAlias = tuple[int, str, bool, bool, list[int], list[int]]

_CPU = torch.device("cpu")  # whatever torch's default is
_POOLED_BYTES = 256 << 10  # for what is smaller malloc has room that stays


class Batch(list[SparseTargets]):
    """A list of targets, and the tensors that they are parts of; pickled, it is a list.

    Args:
        groups: of a selection.
        vocab_size: of the cache.
        temperatures: of the cache.
    """

    def __init__(self, groups: list[Group], vocab_size: int, temperatures: Sequence[float]) -> None:
        self.groups = groups
        self._fields = [_empty(group, len(temperatures)) for group in groups]
        placed: list[SparseTargets | None] = [None] * sum(len(group[4]) for group in groups)
        for group, fields in zip(groups, self._fields, strict=True):
            for i, one in zip(group[4], _targets(group, fields, vocab_size, temperatures), strict=True):
                placed[i] = one
        super().__init__(placed)  # type: ignore[arg-type]  # every place is in one of the groups

    @property
    def addresses(self) -> list[tuple[int, int, int, int, int, int]]:
        """Of each group's tensors, for the engine to fill; 0 for one that is not there.

        Raises:
            ValueError: the memory of one was taken from it.
        """
        return [_addresses(fields) for fields in self._fields]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def fitting(out: list[SparseTargets], selection: _core.CacheSelection) -> Batch:
    """``out``, for the targets of a selection.

    Raises:
        ValueError: it is of no earlier call, or of others than these.
    """
    if not isinstance(out, Batch):
        msg = f"out must be what an earlier read() gave back, got {type(out).__name__}"
        raise ValueError(msg)
    if len(out) != len(selection):
        msg = f"out holds targets of {len(out)} keys, there are {len(selection)}"
        raise ValueError(msg)
    wanted = selection.groups
    if out.groups != wanted:
        for i in range(len(selection)):
            had, wants = _of_place(out.groups, i), _of_place(wanted, i)
            if had != wants:
                msg = f"out does not fit key {i}, {selection.key(i)!r}: it holds {had}, the targets are {wants}"
                raise ValueError(msg)
    return out


def _of_place(groups: list[Group], place: int) -> str:
    for kept, method, ragged, gold, places, counts in groups:
        if place in places:
            more = [word for word, is_so in (("ragged", ragged), ("gold", gold)) if is_so]
            return f"{counts[places.index(place)]} x {kept} of {', '.join([method, *more])}"
    raise AssertionError(place)


class _Fields(NamedTuple):
    """The tensors of samples whose fields are alike, in the engine's order."""

    ids: Tensor  # (n, K) int32
    values: Tensor  # (n, K): logprobs or, of drawn ones, mass
    lse: Tensor | None  # (temperatures, n): those that are stored, then T = 1, of which it is 0
    k_eff: Tensor | None  # (n,) int32
    gold: Tensor | None  # (n,)
    neg_entropy: Tensor | None  # (n,)


def _empty(group: Group, temperatures: int) -> _Fields:
    """With the rows of all samples, one after the other: many small tensors take longer."""
    kept, method, ragged, gold, _, counts = group
    n, drawn = sum(counts), method in SAMPLED

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=_CPU)

    return _Fields(
        ids=_rows(n, kept, torch.int32),
        values=_rows(n, kept, torch.float32),
        lse=None if drawn else torch.zeros((temperatures, n), dtype=torch.float32, device=_CPU),
        k_eff=torch.empty((n,), dtype=torch.int32, device=_CPU) if ragged else None,
        gold=floats(n) if gold else None,
        neg_entropy=floats(n) if drawn else None,
    )


def _rows(n: int, kept: int, dtype: torch.dtype) -> Tensor:
    """(n, kept) entries of four bytes, uninitialised; large ones in memory that earlier ones have left."""
    from kdfast import _core

    count = n * kept
    if 4 * count < _POOLED_BYTES:
        return torch.empty((n, kept), dtype=dtype, device=_CPU)
    return torch.frombuffer(_core.CacheMemory(4 * count), dtype=dtype).view(n, kept)


def _targets(group: Group, fields: _Fields, vocab_size: int, temperatures: Sequence[float]) -> Iterator[SparseTargets]:
    """For each sample its rows of the tensors."""
    _, method, _, _, _, counts = group
    n, drawn = len(fields.ids), method in SAMPLED
    if fields.lse is not None:
        stored = sorted(temperatures, key=lambda t: (t == 1.0, t))  # as the engine fills them
        rows = dict(zip(stored, fields.lse.unbind(), strict=True))
        lse = [rows[t] for t in temperatures]
    else:  # of drawn targets only the temperature is kept: a loss has no use for their normaliser
        lse = [torch.full((n,), 0.0 if t == 1.0 else math.nan, dtype=torch.float32, device=_CPU) for t in temperatures]

    def one(
        ids: Tensor,
        values: Tensor,
        k_eff: Tensor | None,
        gold: Tensor | None,
        neg_entropy: Tensor | None,
        *lse: Tensor,
    ) -> SparseTargets:
        return SparseTargets._checked(
            {
                "ids": ids,
                "logprobs": None if drawn else values,
                "vocab_size": vocab_size,
                "lse": dict(zip(temperatures, lse, strict=True)),
                "k_eff": k_eff,
                "method": method,
                "mass": values if drawn else None,
                "neg_entropy": neg_entropy,
                "gold_logprob": gold,
            }
        )

    whole: tuple[Any, ...] = (fields.ids, fields.values, fields.k_eff, fields.gold, fields.neg_entropy, *lse)
    if len(counts) == 1:
        yield one(*whole)
        return
    # The parts are no views of a tensor that anyone else has: what autograd would note of them takes time.
    parts = [itertools.repeat(None) if t is None else torch.unsafe_split_with_sizes(t, counts) for t in whole]
    yield from itertools.starmap(one, zip(*parts))  # noqa: B905  # what repeats has no end


def _addresses(fields: _Fields) -> tuple[int, int, int, int, int, int]:
    for value in fields:
        if value is not None and value.untyped_storage().nbytes() < value.numel() * value.element_size():
            msg = "the memory of these targets was taken from them: its storage was resized"
            raise ValueError(msg)
    ids, values, *rest = (0 if value is None else value.data_ptr() for value in fields)
    return (ids, values, *rest)  # type: ignore[return-value]  # as many as there are fields
