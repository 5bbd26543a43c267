"""Keys of samples, and the fingerprint of the token ids that a sample's targets were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Key: TypeAlias = str | int
TokenIds: TypeAlias = Tensor | Sequence[int]


def key_text(key: object) -> str:
    """The stored form of a key: text as it is, an int as its decimal string."""
    if isinstance(key, str):
        if not key.isascii():
            require_unicode(key, "a key")
        return key
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return str(int(key))
    msg = f"a key must be a str or an int, got {type(key).__name__}"
    raise TypeError(msg)


def require_unicode(text: str, what: str) -> None:
    """Raises ValueError for a text that UTF-8 cannot hold: half of a surrogate pair, as an escape in JSON makes one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"{what} must be text that UTF-8 can hold, got {text[error.start]!a} at character {error.start}"
        raise ValueError(msg) from None


def token_hash(token_ids: TokenIds, tokens: int, key: str) -> bytes:
    """BLAKE2b of 16 bytes over the token ids as little-endian int64.

    Raises:
        TypeError: ids that are no integers.
        ValueError: ids that are not one a token.
    """
    ids = token_ids if isinstance(token_ids, Tensor) else torch.as_tensor(token_ids)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        msg = f"token_ids of sample {key!r} must be integers, got {ids.dtype}"
        raise TypeError(msg)
    if ids.dim() != 1 or len(ids) != tokens:
        msg = f"token_ids of sample {key!r} must be ({tokens},), one for each token, got {tuple(ids.shape)}"
        raise ValueError(msg)
    return hashlib.blake2b(ids.cpu().numpy().astype("<i8").tobytes(), digest_size=16).digest()
