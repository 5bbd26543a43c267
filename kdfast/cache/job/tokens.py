"""Tokenizers, and the fingerprint by which a cache knows its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.cache.error import JobError
from kdfast.cache.job.samples import Encoder


@dataclass(frozen=True)
class Tokenizer:
    """An encoder, and what tells it from others."""

    encode: Encoder
    fingerprint: str  # BLAKE2b of 16 bytes, of its JSON, or of its vocabulary where it has none


def from_file(path: Path, *, special_tokens: bool) -> Tokenizer:
    """A JSON file of the ``tokenizers`` package.

    Raises:
        JobError: a file that is none.
    """
    import tokenizers

    if not path.is_file():
        msg = f"--tokenizer must be a JSON file of the tokenizers package, got {path}"
        raise JobError(msg)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        msg = f"{path} is no JSON file of the tokenizers package: {error}"
        raise JobError(msg) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    return Tokenizer(encode, _digest(tokenizer.to_str()))


def from_model(directory: Path, *, special_tokens: bool) -> Tokenizer:
    """The tokenizer of a Hugging Face model's directory.

    Raises:
        JobError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{directory} has no tokenizer that loads, pass --tokenizer tokenizer.json: {error}"
        raise JobError(msg) from error

    def encode(texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=special_tokens,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,  # that a text is longer than the model's context is no news: it is cut
        )
        return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    if tokenizer.is_fast:
        return Tokenizer(encode, _digest(tokenizer.backend_tokenizer.to_str()))
    described = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    return Tokenizer(encode, _digest(json.dumps(described, sort_keys=True)))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
