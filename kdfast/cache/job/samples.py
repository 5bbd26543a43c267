"""From documents to the samples that a teacher sees: tokens, cuts and keys."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kdfast.cache.error import JobError

#: Documents, and characters, that are tokenised at once: tokenizers do so in parallel.
_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1 << 20


#: Of a conversation: mappings with ``role`` and ``content``, as chat templates take them.
Messages: TypeAlias = Sequence[Mapping[str, Any]]


class Document(NamedTuple):
    """What one record of the data holds."""

    key: str
    content: str | npt.NDArray[np.int64] | Messages  # text, token ids (S,), or a conversation
    numbered: bool  # whether its samples are numbered where there is only one
    read: float  # share of the data that lies before its end, 0 to 1
    shared: bool = False  # whether every process has it, and takes some of its samples


class Sample(NamedTuple):
    """What the teacher sees at once."""

    key: str
    token_ids: npt.NDArray[np.int64]  # (S,)
    read: float  # share of the data that lies before its end
    kept: npt.NDArray[np.bool_] | None = None  # (S,): the rows that are kept; None: all


class Encoder(Protocol):
    """What turns text into token ids."""

    def __call__(self, texts: Sequence[str], /) -> list[npt.NDArray[np.int64]]:
        """Token ids (S,) of each of some texts."""


class ChatEncoder(Protocol):
    """What turns a conversation into token ids."""

    def __call__(self, messages: Messages, key: str, /) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
        """Token ids (S,), and which of them the assistant has said, where that is wanted."""


def samples_of(
    documents: Iterable[Document],
    encode: Encoder | None,
    length: int,
    rank: int = 0,
    world: int = 1,
    *,
    chat: ChatEncoder | None = None,
) -> Iterator[Sample]:
    """Cuts every document into samples of ``length`` tokens, the last of them shorter.

    A document that fits keeps its key; the samples of another, or of a numbered one, are "key:0", "key:1", ... Of those
    of shared documents every ``world``-th is given, from number ``rank`` on. A conversation is one sample: of a longer
    one the first ``length`` tokens, as trainers cut it.

    Raises:
        JobError: a text where there is no encoder.
    """
    before, shared = 0.0, itertools.count()
    for group in _groups(documents):
        texts = [d.content for d in group if isinstance(d.content, str)]
        if texts and encode is None:
            first = next(d.key for d in group if isinstance(d.content, str))
            msg = f"document {first!r} is text, and there is no tokenizer: pass --tokenizer tokenizer.json"
            raise JobError(msg)
        encoded = iter(encode(texts)) if texts and encode is not None else iter(())
        for document in group:
            kept = None
            if isinstance(document.content, str):
                ids = next(encoded)
            elif isinstance(document.content, np.ndarray):
                ids = document.content
            else:
                ids, kept = _conversation(document.content, document.key, chat, length)
            pieces = [ids[first : first + length] for first in range(0, max(1, len(ids)), length)]
            for i, piece in enumerate(pieces):
                if document.shared and next(shared) % world != rank:
                    continue
                alone = len(pieces) == 1 and not document.numbered
                read = before + (document.read - before) * (i + 1) / len(pieces)
                yield Sample(document.key if alone else f"{document.key}:{i}", piece, read, kept)
            before = document.read


def _conversation(
    messages: Messages, key: str, chat: ChatEncoder | None, length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
    """Its first tokens and, of what the assistant has said, the rows that are about it: each the one before."""
    if chat is None:
        msg = (
            f"document {key!r} is a conversation, and there is no chat template: pass --tokenizer DIR, of a Hugging "
            "Face tokenizer that has one, or --chat-template FILE beside it (the first document says whether all are)"
        )
        raise JobError(msg)
    ids, said = chat(messages, key)
    ids = ids[:length]
    return ids, None if said is None else np.append(said[: len(ids)][1:], False)[: len(ids)]


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.content) if isinstance(document.content, str) else 0
        if len(group) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group
