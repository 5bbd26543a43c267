"""Log-probabilities as inference servers report them, made into rows of entries."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: Of one token: its candidates, (id, log-probability) each, and the log-probability of the token itself or None.
Candidates: TypeAlias = "tuple[Sequence[tuple[int, float]], float | None]"

_MOST_MASS = 1 + 1e-5
_UNLIKELY = -9999.0  # of servers whose JSON has no infinity: as good as none, or not known
_TOKEN_ID = "token_id:"


class Rows(NamedTuple):
    """Fields of targets (S, K): ids int32, logprobs fp32, k_eff int32 and gold_logprob fp32 (S,)."""

    ids: Tensor
    logprobs: Tensor
    k_eff: Tensor
    gold_logprob: Tensor


def rows(tokens: Sequence[Candidates | None], vocab_size: int, k: int | None, source: str) -> Rows:
    """The candidates of some tokens, the most probable first, at most ``k`` of each; none where there are none.

    Raises:
        ValueError: an id twice or out of range, a log-probability that is none, or a mass above 1.
    """
    if k is not None and (not isinstance(k, int) or k < 1):
        msg = f"{source}: k must be a whole number, at least 1, got {k!r}"
        raise ValueError(msg)
    kept = []
    for i, token in enumerate(tokens):
        entries = [] if token is None else list(token[0])
        _check(entries, None if token is None else token[1], vocab_size, f"{source}: token {i}")
        entries = [(token_id, value) for token_id, value in entries if value > _UNLIKELY]
        kept.append(sorted(entries, key=lambda entry: -entry[1])[:k])
    most = max(map(len, kept), default=0)
    if most == 0:
        msg = f"{source}: there is no token with log-probabilities"
        raise ValueError(msg)
    told = [None if token is None else token[1] for token in tokens]
    gold = [-math.inf if value is None or value <= _UNLIKELY else value for value in told]
    k_eff = torch.tensor([len(entries) for entries in kept], dtype=torch.int32)
    used = torch.arange(most) < k_eff.unsqueeze(-1)
    ids = torch.full((len(kept), most), -1, dtype=torch.int32)
    logprobs = torch.full((len(kept), most), -math.inf)
    ids[used] = torch.tensor([token_id for entries in kept for token_id, _ in entries], dtype=torch.int32)
    logprobs[used] = torch.tensor([value for entries in kept for _, value in entries], dtype=torch.float32)
    return Rows(ids, logprobs.clamp_(max=0.0), k_eff, torch.tensor(gold, dtype=torch.float32).clamp_(max=0.0))


def _check(entries: Sequence[tuple[int, float]], gold: float | None, vocab_size: int, where: str) -> None:
    most = max((value for _, value in entries), default=0.0)
    if gold is not None and not gold <= most + 1e-4:
        msg = f"{where}: {gold} is no log-probability of the token that is there, of which the largest is {most}"
        raise ValueError(msg)
    seen = set()
    for token_id, value in entries:
        if not 0 <= token_id < vocab_size:
            msg = f"{where}: id {token_id} is not in [0, {vocab_size}): is vocab_size the teacher's?"
            raise ValueError(msg)
        if token_id in seen:
            msg = f"{where}: id {token_id} is there twice"
            raise ValueError(msg)
        if not value <= 1e-5:  # a NaN neither
            msg = f"{where}: {value} of id {token_id} is no log-probability"
            raise ValueError(msg)
        seen.add(token_id)
    mass = math.fsum(math.exp(value) for _, value in entries)
    if mass > _MOST_MASS:
        msg = f"{where}: its candidates have a mass of {mass:.6g}: they are not at temperature 1 over the vocabulary, "
        msg += "or were rounded to few bits"
        raise ValueError(msg)


def shifted(tokens: Sequence[Candidates | None], source: str) -> list[Candidates | None]:
    """Row i about token i + 1, from what is told of each token of a prompt: nothing of the first, or it is an error."""
    if not tokens or tokens[0] is not None:
        msg = f"{source}: the first entry must be None, as nothing comes before the first token"
        raise ValueError(msg)
    for i, token in enumerate(tokens[1:], 1):
        if token is None:
            msg = f"{source}: token {i} has no log-probabilities"
            raise ValueError(msg)
    return [*tokens[1:], None]


def vllm_tokens(
    prompt_logprobs: Sequence[Mapping[Any, Any] | None], token_ids: Sequence[int] | None, source: str
) -> list[Candidates | None]:
    """Of each token of a prompt what vLLM tells of it; the given token counts where it is among the most probable."""
    if prompt_logprobs is None:
        msg = f"{source}: prompt_logprobs is None: ask with SamplingParams(prompt_logprobs=K)"
        raise ValueError(msg)
    if token_ids is not None and len(token_ids) != len(prompt_logprobs):
        msg = f"{source}: {len(prompt_logprobs)} entries for {len(token_ids)} token_ids"
        raise ValueError(msg)
    every = [
        [(_id(token_id, source), *_logprob_and_rank(value)) for token_id, value in (entry or {}).items()]
        for entry in prompt_logprobs
    ]
    # The most probable were asked for; where the given token is another it is there, too, and its rank is beyond.
    asked = min((len(told) - any((r or 0) > len(told) for *_, r in told) for told in every if told), default=1)
    if asked == 0:
        msg = f"{source}: there is nothing beside the tokens of the prompt: ask with prompt_logprobs=K, at least 1"
        raise ValueError(msg)
    out: list[Candidates | None] = []
    for i, told in enumerate(every):
        if not told:
            out.append(None)
            continue
        gold = None
        if token_ids is not None:
            given = _id(token_ids[i], source)
            gold = next((value for token_id, value, _ in told if token_id == given), None)
            if gold is None:
                msg = f"{source}: entry {i} tells nothing of token id {given}: these are of another prompt"
                raise ValueError(msg)
        out.append(([(a, value) for a, value, rank in told if rank is None or rank <= asked], gold))
    return out


def _id(token_id: Any, source: str) -> int:
    try:
        return int(token_id) if isinstance(token_id, str) else operator.index(token_id)
    except (TypeError, ValueError) as error:
        msg = f"{source}: {token_id!r} is no token id"
        raise ValueError(msg) from error


def _logprob_and_rank(value: Any) -> tuple[float, int | None]:
    if isinstance(value, Mapping):  # JSON of a server
        return float(value["logprob"]), value.get("rank")
    if isinstance(value, numbers.Real):
        return float(value), None
    return float(value.logprob), value.rank


def sglang_tokens(
    meta_info: Mapping[str, Any], token_ids: Sequence[int] | None, source: str
) -> list[Candidates | None]:
    """Of each token of the input that the server was asked about what SGLang tells of it."""
    for name in ("input_token_logprobs", "input_top_logprobs"):
        if not meta_info.get(name):
            msg = f"{source}: meta_info has no {name}: ask with return_logprob=True, logprob_start_len=0 and "
            msg += "top_logprobs_num=K"
            raise ValueError(msg)
    given, top = meta_info["input_token_logprobs"], meta_info["input_top_logprobs"]
    ids = [_id(token_id, source) for _, token_id, *_ in given]
    if len(top) != len(ids):
        msg = f"{source}: input_top_logprobs has {len(top)} entries, input_token_logprobs {len(ids)}"
        raise ValueError(msg)
    if token_ids is not None and ids != [_id(token_id, source) for token_id in token_ids]:
        msg = f"{source}: token_ids are not those that the server was given: {len(ids)} from {ids[:4]} on"
        raise ValueError(msg)
    out: list[Candidates | None] = []
    for (gold, *_), entries in zip(given, top, strict=True):
        if not entries:
            out.append(None)
            continue
        out.append(
            ([(_id(a, source), float(value)) for value, a, *_ in entries], None if gold is None else float(gold))
        )
    return out


def openai_tokens(
    logprobs: Any, ids_of: Callable[[str, bytes | None], int | None] | None, source: str
) -> list[Candidates | None]:
    """Of each generated token what a chat completion tells of it."""
    content = _field(logprobs, "content")
    if not content:
        msg = f"{source}: there is no content: ask for logprobs=True and top_logprobs=20"
        raise ValueError(msg)
    find = _id_in_text if ids_of is None else ids_of

    def id_of(told: Any) -> int:
        text, raw = _field(told, "token"), _field(told, "bytes")
        found = find(text, None if raw is None else bytes(raw))
        if found is None:
            msg = f"{source}: no id is known of the token {text!r}"
            msg += ': pass ids_of=, or ask a vLLM server for "return_tokens_as_token_ids"' if ids_of is None else ""
            raise ValueError(msg)
        return int(found)

    out: list[Candidates | None] = []
    for told in content:
        value = float(_field(told, "logprob"))
        entries: Iterable[Any] = _field(told, "top_logprobs") or ()
        candidates = [(id_of(one), float(_field(one, "logprob"))) for one in entries]
        # They fall; vLLM puts the token itself before them, where it may be none of the most probable.
        if len(candidates) > 1 and candidates[0][1] < candidates[1][1]:
            del candidates[0]
        out.append((candidates, None if value <= _UNLIKELY else value))
    return out


def _id_in_text(token: str, _: bytes | None) -> int | None:
    number = token.removeprefix(_TOKEN_ID)
    return int(number) if number != token and number.isdecimal() else None


def _field(told: Any, name: str) -> Any:
    return told.get(name) if isinstance(told, Mapping) else getattr(told, name, None)
