"""What a student learns from: the teacher's soft targets on disk, or all of its logits in memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kdfast import cache
from kdfast.cache.job import Capture, Filled, Sample, Teacher, fill
from kdfast.cache.statistics import statistics
from kdfast.demo.display import Display
from kdfast.demo.model import GPT
from kdfast.demo.teacher import BATCH, TEACHER_FOLDER, logits_of
from kdfast.spec.sparse import SparseTargets

#: Rows (B,) of the distillation set to logits (B, S, V) or targets (B, S, K).
Targets: TypeAlias = Callable[[Tensor], Tensor | SparseTargets]

COMMIT_SECONDS = 2.0
DESCRIBED_SAMPLES = 64


@dataclass
class Written:
    """What a run wrote into its cache, before and after an interruption."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # from the first batch until all of it is durable
    teacher_seconds: float = 0.0  # of these, in the teacher's forward pass


class Stored:
    """The cache of a run: sequences under their number in the corpus, targets at the one temperature of the run.

    Args:
        folder: of the cache; made where there is none.
        ids: (N, S + 1) int64, the distillation set.
        numbers: (N,) the numbers of its sequences.
        k: entries a token.
        temperature: see above.
    """

    def __init__(self, folder: Path, ids: Tensor, numbers: Tensor, k: int, temperature: float) -> None:
        self.folder = folder
        self.windows = Windows(ids, [str(number) for number in numbers.tolist()])
        self.capture = Capture(k=k, temperatures=(temperature,))

    def write(
        self, teacher: GPT, tokenizer: Tokenizer, written: Written, display: Display, stop: Callable[[], bool]
    ) -> bool:
        """Writes what the cache lacks, and adds to `written`; whether it is whole then, and not stopped before.

        Raises:
            CacheError: the folder holds targets of another teacher, other text or another capture, or is damaged.
        """
        taught = 0.0

        def forward(input_ids: Tensor, _: Tensor) -> Tensor:
            nonlocal taught
            begun = time.perf_counter()
            logits = logits_of(teacher, input_ids)
            taught += time.perf_counter() - begun
            return logits

        vocab_size = teacher.config.vocab_size
        model = Teacher(forward, vocab_size, "kdfast demo", None, "bfloat16", torch.device("cpu"), vocab_size)
        begun = time.perf_counter()
        with cache.Writer(
            self.folder,
            vocab_size=vocab_size,
            teacher=model.name,
            tokenizer=_digest(tokenizer.to_str().encode()),
            revision=_digest((TEACHER_FOLDER / "teacher.safetensors").read_bytes()),
            dtype=model.dtype,
            metadata=self.capture.metadata(),
            temperatures=self.capture.captured,
        ) as writer:
            there = len(self.windows) - len(writer.missing(self.windows.keys))
            if there < len(self.windows):
                display.task("teacher labels the text", len(self.windows))

            def report(filled: Filled) -> None:
                parts = [f"{filled.tokens / (time.perf_counter() - begun):,.0f} tokens/s"]
                if filled.committed:
                    parts.append(f"{filled.committed_bytes / filled.committed:.1f} bytes/token")
                display.advance(there + filled.samples, "  ".join(parts))

            # Batches of one size: what a run that goes on writes is what it would have written at once.
            filled = fill(
                writer,
                model,
                self.windows.samples(),
                self.capture,
                batch_tokens=BATCH * self.windows.length,
                commit_seconds=COMMIT_SECONDS,
                report=report,
                stop=stop,
            )
        if filled.samples:
            written.samples += filled.samples
            written.tokens += filled.tokens
            written.seconds += time.perf_counter() - begun
            written.teacher_seconds += taught
        return filled.finished

    def targets(self) -> Targets:
        """Gives targets (B, S, K), read from disk; that the token ids are those the teacher saw is checked."""
        data = cache.Dataset(cache.Reader(self.folder), self.windows)

        def read(rows: Tensor) -> SparseTargets:
            targets: SparseTargets = cache.collate(data.__getitems__(rows.tolist()))["targets"]
            return targets

        return read

    def description(self) -> dict[str, Any]:
        """What the cache holds and takes; samples of other runs into the same folder are counted, too."""
        reader = cache.Reader(self.folder)
        count = sum(shard.tokens for shard in reader.shards())
        size = sum(file.stat().st_size for file in self.folder.iterdir())
        described = statistics(reader, DESCRIBED_SAMPLES)
        assert described is not None  # topk targets have log-probabilities
        return {
            "folder": self.folder.name,
            "k": self.capture.k,
            "temperatures": list(reader.temperatures),
            "samples": len(reader),
            "tokens": count,
            "bytes": size,
            "bytes_per_token": size / count,
            "tail": described.tail,
        }


class Windows:
    """The distillation set as `kdfast.cache` takes data: one mapping a sequence.

    Args:
        ids: (N, S + 1) int64; the last token of a sequence is a label only, which the teacher does not see.
        keys: a name for each.
    """

    def __init__(self, ids: Tensor, keys: list[str]) -> None:
        self.inputs = ids[:, :-1]
        self.keys = keys

    @property
    def length(self) -> int:
        """Returns S."""
        return self.inputs.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"id": self.keys[index], "input_ids": self.inputs[index]}

    def samples(self) -> Iterator[Sample]:
        """Yields what the job takes."""
        for i, key in enumerate(self.keys):
            yield Sample(key, self.inputs[i].numpy(), (i + 1) / len(self))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
