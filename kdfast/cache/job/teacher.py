"""What runs over the data, and how a cache knows it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from kdfast.cache.error import JobError
from kdfast.integrations.factory import FactoryError, find
from kdfast.spec.head import LMHead
from kdfast.spec.problem import Logits

#: (input_ids (B, S) int64, attention_mask (B, S) int64) to logits (B, S, V), or an LMHead over (B, S, H).
Forward: TypeAlias = Callable[[Tensor, Tensor], Logits]


@dataclass(frozen=True)
class Teacher:
    """A teacher and its identity.

    Args:
        forward: see :data:`Forward`; called without gradients, on right-padded batches.
        vocab_size: V.
        name, revision, dtype: kept in the cache, which takes no targets of another teacher.
        device: of the inputs.
        token_ids: number of ids that it takes, 0 to this - 1.
        check: called with the first inputs before anything is written; raises where ``forward`` is not right.
    """

    forward: Forward
    vocab_size: int
    name: str
    revision: str | None
    dtype: str
    device: torch.device
    token_ids: int
    check: Callable[[Tensor, Tensor], None] | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Logits:
        """The logits of a batch.

        Raises:
            JobError: what comes back is no (B, S, V).
        """
        logits = self.forward(input_ids, attention_mask)
        _check_shape(logits, (*input_ids.shape, self.vocab_size))
        return logits


def from_factory(name: str, device: torch.device, revision: str | None = None, directory: str | None = None) -> Teacher:
    """The teacher that ``module:function``, called without arguments, returns: a :data:`Forward`.

    The module is looked for in ``directory``, the working directory if not given, and where Python looks. The teacher's
    vocabulary is asked of it with one token of id 0.

    Raises:
        JobError: no such function, or what it returns is no teacher.
    """
    try:
        make = find(name, directory)
    except FactoryError as error:
        raise JobError(str(error)) from error
    forward = make()
    if not callable(forward):
        msg = f"--factory {name}: it returned {type(forward).__name__}, not a function of (input_ids, attention_mask)"
        raise JobError(msg)
    with torch.no_grad():
        one = torch.zeros((1, 1), dtype=torch.long, device=device)
        logits = forward(one, torch.ones_like(one))
    _check_shape(logits, (1, 1, None))
    dtype = logits.dtype if isinstance(logits, Tensor) else logits.hidden.dtype
    vocab_size = logits.shape[-1]
    return Teacher(forward, vocab_size, name, revision, str(dtype).removeprefix("torch."), device, vocab_size)


def from_model(directory: Path, *, dtype: str, device: torch.device, length: int, whole_logits: bool) -> Teacher:
    """A causal language model of ``transformers``, from its directory.

    Args:
        directory: of ``save_pretrained``.
        dtype: "auto", as its files have it, or a name of torch's.
        device: of the model.
        length: tokens of the longest sample.
        whole_logits: takes the model's own logits, (B, S, V) at once, in place of its hidden states and its head.

    Raises:
        JobError: a directory that does not load, or a model with fewer positions than ``length``.
    """
    from kdfast.integrations.huggingface import CausalLM, fingerprint, load

    if not (directory / "config.json").is_file():
        msg = f"--model must be the directory of a Hugging Face model, with a config.json; got {directory}"
        raise JobError(msg)
    try:
        model = load(directory, dtype=dtype, device=device)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{directory} does not load as a causal language model: {error}"
        raise JobError(msg) from error
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        msg = f"samples of {length} tokens, and the model has {positions} positions: pass --length {positions}"
        raise JobError(msg)
    remedy = "pass --whole-logits to take the model's own"
    try:
        head = None if whole_logits else CausalLM(model)
    except ValueError as error:
        msg = f"{error}: {remedy}"
        raise JobError(msg) from error

    def whole(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def check(input_ids: Tensor, attention_mask: Tensor) -> None:
        assert head is not None
        try:
            head.check(input_ids, attention_mask)
        except ValueError as error:
            msg = f"{error}: {remedy}"
            raise JobError(msg) from error

    one = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        vocab_size = whole(one, torch.ones_like(one)).shape[-1]
    return Teacher(
        head or whole,
        vocab_size,
        directory.resolve().name,
        fingerprint(directory),
        str(model.dtype).removeprefix("torch."),
        device,
        model.get_input_embeddings().num_embeddings,
        check if head is not None else None,
    )


def _check_shape(logits: object, expected: tuple[int | None, ...]) -> None:
    if not isinstance(logits, (Tensor, LMHead)):
        msg = f"the teacher must return logits (B, S, V) or a kdfast.LMHead, got {type(logits).__name__}"
        raise JobError(msg)
    shape = tuple(logits.shape)
    if len(shape) != len(expected) or any(e not in (None, n) for e, n in zip(expected, shape, strict=True)):
        wanted = ", ".join("V" if n is None else str(n) for n in expected)
        msg = f"the teacher must return logits ({wanted}), got {shape}"
        raise JobError(msg)
