"""Searches tiles and warps on this GPU, a process each, and says what the table that ships would become."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

_WORK: dict[str, dict[str, Any]] = {
    "light": {"divergence": "forward_kl"},
    "other": {"divergence": "jsd"},
    "many": {"divergence": {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2}},
    "capped": {"divergence": "forward_kl"},  # of two heads with a softcap
    "kept": {"divergence": "forward_kl"},  # of a teacher's 64 most probable columns
}
_COLUMNS = (1024, 2048, 4096, 8192, 16384)
_WARPS = (4, 8, 16, 32)


def candidates(*, rehearse: bool) -> list[str]:
    """Items of the search, the smaller tiles first; a rehearsal has fewer."""
    return [
        f"{work}|{columns}|{warps}"
        for columns in (_COLUMNS[:1] if rehearse else _COLUMNS)
        for warps in (_WARPS[:2] if rehearse else _WARPS)
        for work in _WORK
        if 4 <= columns // (32 * warps) <= 64
    ]


def time_tile(device: Any, work: str, columns: int, warps: int, *, rehearse: bool) -> float:
    """Milliseconds of a step of a kind of work, forward and backward, at a tile."""
    import torch

    import kdfast
    from bench.gpu.dense import DenseCase, Inputs
    from bench.gpu.timing import Clock
    from kdfast.kernels.triton import tiles

    tokens, vocab = (2, 600) if rehearse else (4096, 128256)
    clock = Clock(device)
    x = Inputs(DenseCase("forward_kl", tokens, vocab, "bf16"), device)
    leaf: Any = x.student
    student: Any = leaf
    teacher: Any = x.teacher
    if work == "kept":
        teacher = kdfast.soft_targets(x.teacher, k=64, temperatures=(2.0,))
    if work == "capped":  # as narrow as heads get: their products take the same time at every tile
        leaf = torch.zeros(tokens, 8, dtype=x.student.dtype, device=device, requires_grad=True)
        weight = torch.zeros(vocab, 8, dtype=leaf.dtype, device=device)
        student, teacher = (kdfast.LMHead(h, weight, softcap=30.0) for h in (leaf, leaf.detach()))

    def step() -> None:
        leaf.grad = None
        kdfast.distill_loss(student, teacher, x.labels, temperature=2.0, backend="triton", **_WORK[work]).backward()

    with mock.patch.object(tiles, "dense_tile", return_value=tiles.Tile(columns, warps)):
        step()
        return statistics.median(clock.time(step) for _ in range(1 if rehearse else 5))


def table(shipped: Path, architecture: str, milliseconds: dict[str, float]) -> tuple[str, list[str]]:
    """The table's text with the fastest tile of each kind of work, and a line for each that changed.

    Args:
        shipped: the table as it is.
        architecture: its row that is searched.
        milliseconds: of items; kinds of work without any stay as they are.
    """
    content, said = json.loads(shipped.read_text()), []
    for work in _WORK:
        found = {item: ms for item, ms in milliseconds.items() if item.split("|")[0] == work}
        if not found:
            continue
        item = min(found, key=found.__getitem__)
        best = [int(n) for n in item.split("|")[1:]]
        was = content["dense"][architecture][work]
        if best != was:
            before = found.get(f"{work}|{was[0]}|{was[1]}")
            gain = f"{found[item]:.3f} ms" + (f" in the place of {before:.3f}" if before is not None else "")
            said.append(f"tiles.json, dense, {architecture}, {work}: {was} to {best}, {gain}")
        content["dense"][architecture][work] = best
    rows = {op: ",\n".join(f'    "{a}": {json.dumps(w)}' for a, w in row.items()) for op, row in content.items()}
    return "{\n" + ",\n".join(f'  "{op}": {{\n{row}\n  }}' for op, row in rows.items()) + "\n}\n", said
