"""Writes a cache with kdfast's own writer and what it holds: PYTHONPATH=tests/cache.

Unlike the other golden caches it is another one each time: writers, shards and times are named at random. It is kept so
that what a version has written stays readable; the numbers are those of a fixed cache of the same targets.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from format_readers import Document, in_use

from kdfast import SparseTargets, soft_targets
from kdfast.cache import Writer

FOLDER = Path(__file__).parent / "written-v1"
VOCAB, TEMPERATURES = 40, (1.0, 2.0)


def targets(tokens: int, seed: int, *, gold: bool = False, **options: object) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, VOCAB, generator=generator) - torch.log1p(torch.arange(VOCAB))
    made = soft_targets(logits, temperatures=TEMPERATURES, **options)
    if not gold:
        return made
    gold_logprob = -torch.rand(tokens, generator=generator)
    fields = {name: getattr(made, name) for name in ("lse", "k_eff", "method")}
    return SparseTargets(made.ids, made.logprobs, vocab_size=VOCAB, gold_logprob=gold_logprob, **fields)


def write(folder: Path, tier: str) -> None:
    with Writer(folder, vocab_size=VOCAB, temperatures=TEMPERATURES, tier=tier, block_tokens=64) as writer:
        writer.write("topk", targets(66, 1, k=2), list(range(66)))
        writer.write("topp", targets(20, 2, k=(1, 8), method="topp", p=0.7, gold=True))
        writer.commit()
        for i in range(3):
            writer.write(f"more {i}", targets(9, 3 + i, k=6), list(range(9)))
            writer.commit()


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    write(FOLDER / "compact", "compact")
    with tempfile.TemporaryDirectory() as other:
        write(Path(other) / "fixed", "fixed")
        cache = Document(Path(other) / "fixed")
        lines = [f"{json.dumps(key)}: {json.dumps(in_use(cache.fields(key)))}" for key in sorted(cache.keys())]
    (FOLDER / "compact.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
