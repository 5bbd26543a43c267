"""A byte-level BPE tokenizer and the packing of files into one stream of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from kdfast.demo.corpus import SourceFile

VOCAB_SIZE = 4096
END_OF_FILE = "<|endoffile|>"


def train_tokenizer(files: Iterable[SourceFile], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns byte-level BPE merges from the given files; every byte string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    # Indentation is most of what Python source repeats: a run of spaces is one piece, less the space that
    # belongs to the word after it, as in the splitting rule of GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer from its JSON file."""
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, files: Iterable[SourceFile]) -> Tensor:
    """Encodes files into one stream, each followed by the end-of-file token.

    Returns:
        (N,) int64 token ids.
    """
    end = tokenizer.token_to_id(END_OF_FILE)
    if end is None:
        msg = f"tokenizer has no token {END_OF_FILE}: it was not trained by train_tokenizer"
        raise ValueError(msg)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in files]):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)
