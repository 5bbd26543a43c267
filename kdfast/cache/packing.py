"""Samples of a cache as packed targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kdfast.spec.packed import PackedTargets
from kdfast.views import view

if TYPE_CHECKING:
    from kdfast import _core


def packed(
    engine: _core.CacheReader,
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
    stored = [t for t in temperatures if t != 1.0]
    entries, made = [selection.entry(i) for i in range(len(selection))], []
    for i, entry in enumerate(entries):
        if entry.tier != "fixed":
            msg = (
                f"sample {selection.key(i)!r} is of the {entry.tier} tier: only the fixed tier unpacks on a "
                "device, read() gives the targets of any"
            )
            raise ValueError(msg)
        made.append(_empty(entry, selection.range(i)[1], len(stored)))
    packs: dict[int, _core.CachePackedData] = {}

    def pack(files: dict[int, str]) -> None:
        some = [i for i, entry in enumerate(entries) if not files or entry.shard in files]
        items = [(entries[i], *selection.range(i), *(None if x is None else view(x) for x in made[i])) for i in some]
        data = engine.pack(items, torch.get_num_threads(), files)  # type: ignore[arg-type]  # views in their order
        packs.update(zip(some, data, strict=True))

    serve(selection.shards, pack)
    out = []
    for i, (entry, fields) in enumerate(zip(entries, made, strict=True)):
        data = packs[i]
        offset, top, lse, k_eff, gold = fields
        of_stored = {} if lse is None else dict(zip(stored, lse, strict=True))
        out.append(
            PackedTargets(
                _bytes(data),
                offset,
                top,
                kept=entry.kept,
                vocab_size=vocab_size,
                grid=data.grid,
                lse={t: of_stored.get(t) for t in temperatures},
                k_eff=k_eff,
                method=entry.method,
                gold_logprob=gold,
            )
        )
    return out


def _bytes(data: _core.CachePackedData) -> Tensor:
    """(n,) uint8, which lie where they were packed."""
    if len(data) == 0:  # which torch makes no tensor of
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(data, dtype=torch.uint8)


class _Fields(NamedTuple):
    """Tensors for the engine to fill, (n) each, lse (temperatures, n)."""

    offset: Tensor
    top: Tensor
    lse: Tensor | None
    k_eff: Tensor | None
    gold: Tensor | None


def _empty(entry: _core.CacheEntry, n: int, temperatures: int) -> _Fields:
    return _Fields(
        torch.empty(n, dtype=torch.int32, device="cpu"),
        torch.empty(n, device="cpu"),
        torch.empty(temperatures, n, device="cpu") if temperatures else None,
        torch.empty(n, dtype=torch.int32, device="cpu") if entry.ragged else None,
        torch.empty(n, device="cpu") if entry.gold else None,
    )
