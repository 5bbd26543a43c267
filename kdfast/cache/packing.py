"""Samples of a cache as packed targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kdfast.cache.batch import Group
from kdfast.spec.packed import PackedTargets

if TYPE_CHECKING:
    from kdfast import _core

_CPU = torch.device("cpu")  # whatever torch's default is


def packed(
    selection: _core.CacheSelection,
    serve: Callable[[Iterable[int], Callable[[dict[int, str]], None]], None],
    vocab_size: int,
    temperatures: Sequence[float],
) -> list[PackedTargets]:
    """Packed targets (n, K) of each selection; ``serve`` calls with the files of shards that lie elsewhere.

    Raises:
        CacheError: data that are damaged.
        ValueError: a sample that is not of the fixed tier.
    """
    for i in range(len(selection)):
        if (tier := selection.entry(i).tier) != "fixed":
            msg = (
                f"sample {selection.key(i)!r} is of the {tier} tier: only the fixed tier unpacks on a "
                "device, read() gives the targets of any"
            )
            raise ValueError(msg)
    stored = [t for t in temperatures if t != 1.0]
    groups = selection.groups
    fields = [_empty(group, len(stored)) for group in groups]
    addresses = [_addresses(one) for one in fields]
    data: dict[int, _core.CachePackedData] = {}

    def pack(files: dict[int, str]) -> None:
        data.update(selection.pack(addresses, torch.get_num_threads(), files))

    serve(selection.shards, pack)
    made: dict[int, PackedTargets] = {}
    for group, one in zip(groups, fields, strict=True):
        made.update(_targets(group, one, data, vocab_size, temperatures, stored))
    return [made[i] for i in range(len(selection))]


class _Fields(NamedTuple):
    """The tensors of samples whose fields are alike, (n) each, lse (temperatures, n), in the engine's order."""

    offset: Tensor
    top: Tensor
    lse: Tensor | None
    k_eff: Tensor | None
    gold: Tensor | None


def _empty(group: Group, temperatures: int) -> _Fields:
    """With the rows of all samples, one after the other: many small tensors take longer."""
    _, _, ragged, gold, _, counts = group
    n = sum(counts)
    return _Fields(
        torch.empty(n, dtype=torch.int32, device=_CPU),
        torch.empty(n, dtype=torch.float32, device=_CPU),
        torch.empty((temperatures, n), dtype=torch.float32, device=_CPU) if temperatures else None,
        torch.empty(n, dtype=torch.int32, device=_CPU) if ragged else None,
        torch.empty(n, dtype=torch.float32, device=_CPU) if gold else None,
    )


def _addresses(fields: _Fields) -> tuple[int, int, int, int, int, int]:
    return (*(0 if value is None else value.data_ptr() for value in fields), 0)  # type: ignore[return-value]


def _targets(
    group: Group,
    fields: _Fields,
    data: dict[int, _core.CachePackedData],
    vocab_size: int,
    temperatures: Sequence[float],
    stored: Sequence[float],
) -> Iterator[tuple[int, PackedTargets]]:
    """Each sample's place, and its rows of the tensors."""
    kept, method, _, _, places, counts = group
    whole: list[Tensor | None] = [fields.offset, fields.top, fields.k_eff, fields.gold]
    whole += [] if fields.lse is None else list(fields.lse.unbind())
    # The parts are no views of a tensor that anyone else has: what autograd would note of them takes time.
    parts: list[Any] = [
        itertools.repeat(None) if t is None else torch.unsafe_split_with_sizes(t, counts) for t in whole
    ]
    for place, (offset, top, k_eff, gold, *lse) in zip(places, zip(*parts), strict=True):  # noqa: B905  # no end
        of_stored = dict(zip(stored, lse, strict=True))
        yield (
            place,
            PackedTargets._checked(
                {
                    "data": _bytes(data[place]),
                    "offset": offset,
                    "top": top,
                    "kept": kept,
                    "vocab_size": vocab_size,
                    "grid": data[place].grid,
                    "lse": {t: of_stored.get(t) for t in temperatures},
                    "k_eff": k_eff,
                    "method": method,
                    "gold_logprob": gold,
                }
            ),
        )


def _bytes(data: _core.CachePackedData) -> Tensor:
    """(n,) uint8, which lie where they were packed."""
    if len(data) == 0:  # which torch makes no tensor of
        return torch.empty(0, dtype=torch.uint8, device=_CPU)
    return torch.frombuffer(data, dtype=torch.uint8)
