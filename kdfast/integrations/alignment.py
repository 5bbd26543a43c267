"""Which tokens of two tokenizers belong to the same characters of one text.

Two models with different tokenizers can be compared where both have read the same text: after token i of one and token
j of the other that end at the same character. Everything here works on character offsets, the (start, end) that fast
tokenizers report for every token, and knows nothing of the tokenizers behind them.

What offsets look like in practice, and what is made of it:

- Special tokens, padding and the like have an empty span: they belong to no group.
- Some tokenizers count the space before a word to its token, some leave it to nobody. A character that no token covers
  is taken to belong to the token after it, so only where tokens end decides.
- A character may take several tokens, as the bytes of an emoji do: their spans overlap, and only the last of them ends
  the character.
- Text may be covered by one side alone, because the other was cut off or has no tokens for it. What follows the last
  shared end belongs to no group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Offsets = Sequence[tuple[int, int]]


class Group(NamedTuple):
    """Tokens that cover the same characters; no part of a group does, on both sides."""

    a: slice  # of A's tokens
    b: slice  # of B's tokens
    text: slice  # of the characters, from the end of the group before


@dataclass(frozen=True)
class Alignment:
    """Groups of tokens that cover the same characters, in the order of the text."""

    groups: tuple[Group, ...]

    @property
    def last_tokens(self) -> list[tuple[int, int]]:
        """(i, j) of each group's last tokens: rows i and j of the logits both predict what follows one character."""
        return [(group.a.stop - 1, group.b.stop - 1) for group in self.groups]


@dataclass(frozen=True)
class TextAlignment(Alignment):
    """The alignment of a text, with the token ids that its indices refer to."""

    ids_a: list[int]
    ids_b: list[int]


def align(offsets_a: Offsets, offsets_b: Offsets) -> Alignment:
    """Groups the tokens of two tokenizations of one text so that both sides of a group cover the same characters.

    Groups are as small as they can be, and in order. A group ends where a token of A and a token of B end at the same
    character, and no later token covers a part of it.

    Args:
        offsets_a: (start, end) of each token of A, in characters of the text, the end exclusive.
        offsets_b: the same of B.

    Returns:
        :class:`Alignment`: ``.groups``, and ``.last_tokens``, the rows of logits that can be compared.

    Raises:
        TypeError: an entry that is no pair of integers.
        ValueError: offsets that go backwards, which those of a single text do not.

    Example:
        >>> un_believ_able, unbeliev_able = [(0, 2), (2, 8), (8, 12)], [(0, 8), (8, 12)]
        >>> alignment = align(un_believ_able, unbeliev_able)
        >>> alignment.groups[0].a, alignment.groups[0].b
        (slice(0, 2, None), slice(0, 1, None))
        >>> alignment.last_tokens
        [(1, 0), (2, 1)]
    """
    return Alignment(_groups(offsets_a, offsets_b))


def align_texts(text: str, tokenizer_a: Any, tokenizer_b: Any, *, add_special_tokens: bool = True) -> TextAlignment:
    """Encodes a text with two tokenizers and aligns their tokens.

    Args:
        text: what both models read.
        tokenizer_a: a ``tokenizers.Tokenizer``, or a fast tokenizer of transformers.
        tokenizer_b: the same; the two may be of different kinds.
        add_special_tokens: as the tokenizers take it; special tokens have ids, and belong to no group.

    Returns:
        :class:`TextAlignment`: as :func:`align`, and ``.ids_a``, ``.ids_b``.

    Raises:
        TypeError: a tokenizer that reports no offsets, such as a slow one of transformers.
        ValueError: offsets that go backwards.
    """
    ids_a, offsets_a = _encode("tokenizer_a", tokenizer_a, text, add_special_tokens)
    ids_b, offsets_b = _encode("tokenizer_b", tokenizer_b, text, add_special_tokens)
    return TextAlignment(_groups(offsets_a, offsets_b), ids_a, ids_b)


class _Piece(NamedTuple):
    """Tokens start:stop whose spans overlap, up to a character where the next token may begin."""

    start: int
    stop: int
    end: int  # in characters


def _groups(offsets_a: Offsets, offsets_b: Offsets) -> tuple[Group, ...]:
    a, b = _pieces("offsets_a", offsets_a), _pieces("offsets_b", offsets_b)
    groups: list[Group] = []
    first_a = first_b = i = j = begin = 0
    while i < len(a) and j < len(b):
        if a[i].end < b[j].end:
            i += 1
        elif a[i].end > b[j].end:
            j += 1
        else:
            tokens = slice(a[first_a].start, a[i].stop), slice(b[first_b].start, b[j].stop)
            groups.append(Group(*tokens, slice(begin, a[i].end)))
            begin = a[i].end
            i, j = i + 1, j + 1
            first_a, first_b = i, j
    return tuple(groups)


def _pieces(name: str, offsets: Offsets) -> list[_Piece]:
    pieces: list[_Piece] = []
    before = 0  # start of the last token that covers anything
    for k, span in enumerate(offsets):
        start, end = _span(name, k, span)
        if start == end:
            continue
        reached = pieces[-1].end if pieces else 0
        if start < before or end < reached:
            msg = (
                f"{name} must not go backwards, got {(start, end)} at token {k} after a token that starts at {before} "
                f"and text read up to {reached}: align one text at a time, without a pair or overflowing parts"
            )
            raise ValueError(msg)
        if start < reached:
            pieces[-1] = pieces[-1]._replace(stop=k + 1, end=end)
        else:
            pieces.append(_Piece(k, k + 1, end))
        before = start
    return pieces


def _span(name: str, k: int, span: object) -> tuple[int, int]:
    if not (isinstance(span, Sequence) and len(span) == 2 and all(isinstance(x, int) for x in span)):
        msg = f"{name}[{k}] must be a pair (start, end) of integers, got {span!r}: pass the offsets of one encoding"
        raise TypeError(msg)
    start, end = span
    if not 0 <= start <= end:
        msg = f"{name}[{k}] must be (start, end) with 0 <= start <= end, got {(start, end)}"
        raise ValueError(msg)
    return start, end


def _encode(name: str, tokenizer: Any, text: str, add_special_tokens: bool) -> tuple[list[int], Offsets]:
    """Ids and offsets; transformers' tokenizers are told from those of tokenizers by being callable."""
    if callable(tokenizer):
        if not getattr(tokenizer, "is_fast", False):
            msg = (
                f"{name} must report character offsets, got {type(tokenizer).__name__}, which is no fast tokenizer: "
                "load it with AutoTokenizer.from_pretrained(..., use_fast=True), or, if it has no fast form, give the "
                "(start, end) of each of its tokens to align()"
            )
            raise TypeError(msg)
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        return list(encoded["input_ids"]), encoded["offset_mapping"]
    if not hasattr(tokenizer, "encode"):
        msg = (
            f"{name} must be a tokenizers.Tokenizer or a fast tokenizer of transformers, "
            f"got {type(tokenizer).__name__}: pass the tokenizer itself, or its offsets to align()"
        )
        raise TypeError(msg)
    encoded = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return encoded.ids, encoded.offsets
