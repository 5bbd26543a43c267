"""Writes a cache with an index of two files, by kdfast itself.

Like the caches of ``make_written`` it is another one each time, and is kept so that an index that a version has written
stays readable.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from kdfast import SparseTargets
from kdfast.cache import Writer

FOLDER = Path(__file__).parent / "index-v1"


def write(folder: Path, numbers: range) -> None:
    with Writer(folder, vocab_size=40, shard_bytes=8192) as writer:
        for i in numbers:
            ids = torch.tensor([[i % 40, (i + 1) % 40]], dtype=torch.int32)
            logprobs = torch.tensor([[-0.5, -1.5]])
            writer.write(f"sample {i}", SparseTargets(ids, logprobs, vocab_size=40), [i])


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    write(FOLDER, range(120))
    write(FOLDER, range(120, 130))


if __name__ == "__main__":
    main()
