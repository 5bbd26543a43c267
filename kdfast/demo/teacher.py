"""The teacher that ships with the package, and the labels it gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from kdfast.demo.model import GPT, GPTConfig
from kdfast.demo.settings import DemoError
from kdfast.demo.tokenizer import load_tokenizer

TEACHER_FOLDER = Path(__file__).parent / "teacher"
BATCH = 8  # sequences that the teacher sees at a time


def load_teacher(folder: Path = TEACHER_FOLDER) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Returns the trained teacher, its tokenizer and the record of its training."""
    record: dict[str, Any] = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
    model = GPT(GPTConfig(**record["config"]))
    model.load_state_dict(load_file(folder / "teacher.safetensors"))
    return model.requires_grad_(requires_grad=False).eval(), load_tokenizer(folder / "tokenizer.json"), record


def logits_of(teacher: GPT, inputs: Tensor) -> Tensor:
    """Returns (B, S, V) bf16 logits of (B, S) token ids: what goes into the cache and what is kept in memory alike."""
    # In fp32: without bf16 instructions autocast is slower, and the labels must not depend on what was faster.
    with torch.inference_mode():
        logits: Tensor = teacher(inputs)
        return logits.bfloat16()


def label(teacher: GPT, ids: Tensor, report: Callable[[int, int], None]) -> Tensor:
    """Runs the teacher once over every sequence.

    Args:
        teacher: the model to ask.
        ids: (N, S + 1) int64; the last token of a sequence is a label only.
        report: called with the number of sequences done and N after each batch.

    Returns:
        (N, S, V) bf16 logits: N * S * V * 2 bytes of memory.

    Raises:
        DemoError: the machine has not that much memory to spare.
    """
    check_memory(teacher, ids)
    count, length = ids.shape[0], ids.shape[1] - 1
    logits = torch.empty(count, length, teacher.config.vocab_size, dtype=torch.bfloat16)
    for start in range(0, count, BATCH):
        part = ids[start : start + BATCH]
        logits[start : start + len(part)] = logits_of(teacher, part[:, :-1])
        report(start + len(part), count)
    return logits


def check_memory(teacher: GPT, ids: Tensor) -> None:
    """Raises DemoError where the machine has no room for the logits that `label` would return."""
    tokens = ids[:, 1:].numel()
    needed = tokens * teacher.config.vocab_size * 2
    available = available_memory()
    if available is not None and needed > 0.8 * available:
        msg = (
            f"the teacher's logits take {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free: ask for "
            f"fewer with --tokens (now {tokens}), or train from disk alone, with --no-compare and without --online"
        )
        raise DemoError(msg)


def available_memory() -> int | None:
    """Returns the bytes a new process could use without swapping, or None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one without this name
        return None
