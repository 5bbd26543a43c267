"""Searches tiles and warps on this GPU and writes the table that ships."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from unittest import mock

import torch

import kdfast
from bench.gpu.dense import DenseCase, Inputs
from bench.gpu.timing import Clock

_WORK = {
    "light": {"divergence": "forward_kl"},
    "other": {"divergence": "jsd"},
    "many": {"divergence": {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2}},
    "capped": {"divergence": "forward_kl"},  # of two heads with a softcap
    "kept": {"divergence": "forward_kl"},  # of a teacher's 64 most probable columns
}
_COLUMNS = (1024, 2048, 4096, 8192, 16384)
_WARPS = (4, 8, 16, 32)


def autotune(clock: Clock, table_file: Path, *, rehearse: bool = False) -> list[str]:
    """Time every tile and number of warps for each kind of work; write the fastest; return what was seen.

    A rehearsal has few columns and fewer tiles to choose from.
    """
    from kdfast.kernels.triton import tiles

    tokens, vocab, choices = (2, 600, _COLUMNS[:2]) if rehearse else (4096, 128256, _COLUMNS)
    x = Inputs(DenseCase("forward_kl", tokens, vocab, "bf16"), clock.device)
    arch, said = tiles.architecture(clock.device), []
    table = json.loads(table_file.read_text())
    for work, options in _WORK.items():
        leaf: torch.Tensor = x.student
        student: kdfast.LMHead | torch.Tensor = leaf
        teacher: object = x.teacher
        if work == "kept":
            teacher = kdfast.soft_targets(x.teacher, k=64, temperatures=(2.0,))
        if work == "capped":  # as narrow as heads get: their products take the same time at every tile
            leaf = torch.zeros(tokens, 8, dtype=x.student.dtype, device=x.student.device, requires_grad=True)
            weight = torch.zeros(vocab, 8, dtype=leaf.dtype, device=leaf.device)
            student, teacher = (kdfast.LMHead(h, weight, softcap=30.0) for h in (leaf, leaf.detach()))

        def step(
            options: dict[str, object] = options,
            leaf: torch.Tensor = leaf,
            student: kdfast.LMHead | torch.Tensor = student,
            teacher: object = teacher,
        ) -> None:
            leaf.grad = None
            kdfast.distill_loss(student, teacher, x.labels, temperature=2.0, backend="triton", **options).backward()  # type: ignore[arg-type]

        found: dict[tuple[int, int], float] = {}
        for columns in choices:
            for warps in _WARPS:
                if not 4 <= columns // (32 * warps) <= 64:
                    continue
                with mock.patch.object(tiles, "dense_tile", return_value=tiles.Tile(columns, warps)):
                    step()
                    found[columns, warps] = statistics.median(clock.time(step) for _ in range(1 if rehearse else 5))
                said.append(f"{work}: {columns} columns, {warps} warps: {found[columns, warps]:.3f} ms")
        best = min(found, key=found.__getitem__)
        said.append(f"{work}: best {best[0]} columns, {best[1]} warps")
        table["dense"][arch][work] = list(best)
        torch.cuda.empty_cache()
    rows = {op: ",\n".join(f'    "{a}": {json.dumps(w)}' for a, w in row.items()) for op, row in table.items()}
    table_file.write_text("{\n" + ",\n".join(f'  "{op}": {{\n{row}\n  }}' for op, row in rows.items()) + "\n}\n")
    return said
