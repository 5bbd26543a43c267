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
from kdfast.cache.job.samples import ChatEncoder, Encoder, Messages


@dataclass(frozen=True)
class Tokenizer:
    """An encoder, and what tells it from others."""

    encode: Encoder
    fingerprint: str  # BLAKE2b of 16 bytes, of its JSON, or of its vocabulary where it has none
    chat: ChatEncoder | None = None
    template: str | None = None  # BLAKE2b of 16 bytes of the chat template


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


def from_model(
    directory: Path,
    *,
    special_tokens: bool,
    conversations: bool,
    template: Path | None = None,
    completions_only: bool = False,
) -> Tokenizer:
    """The tokenizer of a Hugging Face model's directory.

    Args:
        directory: of the model, or of its tokenizer.
        special_tokens: of texts; those of conversations are its template's.
        conversations: the data are conversations, which go through the tokenizer's chat template.
        template: file of a chat template, in place of the tokenizer's own.
        completions_only: of conversations, tell which tokens the assistant has said.

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

    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            msg = f"--chat-template {template}: {error}"
            raise JobError(msg) from error
    has = conversations and isinstance(tokenizer.chat_template, str)
    chat = _chat(tokenizer, completions_only=completions_only) if has else None
    described = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.all_special_tokens}
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(described, sort_keys=True)
    return Tokenizer(encode, _digest(text), chat, _digest(tokenizer.chat_template) if has else None)


def _chat(tokenizer: Any, *, completions_only: bool) -> ChatEncoder:
    """Conversations by the tokenizer's chat template, without a generation prompt."""

    def encode(messages: Messages, key: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
        try:
            encoded = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=completions_only
            )
        except Exception as error:  # whatever a template does
            msg = f"document {key!r}: the chat template does not take this conversation: {error}"
            raise JobError(msg) from error
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        if not completions_only:
            return ids, None
        said = np.array(encoded["assistant_masks"], dtype=bool)
        spoke = any(m.get("role") == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages)
        if spoke and not said.any():
            msg = (
                f"document {key!r}: the chat template does not say which tokens are the assistant's: pass "
                "--chat-template with one that has {% generation %} and {% endgeneration %} around what the assistant "
                "says, or leave --completions-only out"
            )
            raise JobError(msg)
        return ids, said

    return encode


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
