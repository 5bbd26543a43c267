"""What a Distiller is given, looked at where it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn

from kdfast.cache.reader import Reader
from kdfast.methods.batch import Inputs
from kdfast.methods.layers import unwrapped
from kdfast.methods.loss import Loss, LossLike, as_loss, named
from kdfast.methods.positions import encoder_decoder
from kdfast.methods.projection import Projection
from kdfast.methods.step import IGNORED

Teacher: TypeAlias = nn.Module | Reader


def teachers_of(student: nn.Module, given: Any) -> tuple[Teacher, ...]:
    """One teacher, several or none, as a tuple.

    Raises:
        TypeError: a teacher of another kind.
        ValueError: one that the student's gradient would reach, or whose eval mode would be the student's.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    teachers: list[Any] = [] if given is None else list(given) if several else [given]
    for one in teachers:
        if not isinstance(one, (nn.Module, Reader)):
            msg = f"teacher must be a module, a kdfast.cache.Reader or a sequence of them, got {type(one).__name__}"
            raise TypeError(msg)
        if isinstance(one, nn.Module) and unwrapped(one) is unwrapped(student):
            msg = "teacher is the student itself, which would go into eval mode: give a copy, copy.deepcopy(student)"
            raise ValueError(msg)
        if isinstance(one, nn.Module) and _holds_adapters(student, one):
            msg = (
                "teacher is the base of the student, in which its adapters are: give "
                "kdfast.integrations.huggingface.WithoutAdapters(student), or a copy made before they were added"
            )
            raise ValueError(msg)
    return tuple(teachers)


def _holds_adapters(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether a PeftModel's trained adapters are within the teacher, its base; a soft prompt is not."""
    inner: Any = unwrapped(student)
    of_peft = hasattr(inner, "get_base_model") and inner.get_base_model() is unwrapped(teacher)
    return of_peft and any(p.requires_grad for p in teacher.parameters())


def losses_of(given: Any) -> nn.ModuleDict:
    """Losses by the names of their terms.

    Raises:
        TypeError: one loss in the place of a list, or what is no loss.
        ValueError: no loss.
    """
    if isinstance(given, Loss) or callable(given):
        name = getattr(given, "__name__", "it")
        written = f"{type(given).__name__}(...)" if isinstance(given, Loss) else name
        msg = f"losses must be a list of losses, got a single {type(given).__name__}: give [{written}]"
        raise TypeError(msg)
    losses: Sequence[LossLike] = given
    found = nn.ModuleDict(named([as_loss(one) for one in losses]))
    if not found:
        msg = "losses is empty: give at least one, as kdfast.methods.KD()"
        raise ValueError(msg)
    return found


def checked_head(name: str, given: Any) -> Projection | None:
    """An output projection, or None.

    Args:
        name: of the option, for messages.
        given: its value.
    """
    if given is not None and not isinstance(given, Projection):
        msg = f"{name} must be a kdfast.methods.Projection or None, got {type(given).__name__}"
        raise TypeError(msg)
    return given


def teacher_heads_of(given: Any, teachers: Sequence[Teacher]) -> tuple[Projection | None, ...]:
    """An output projection, or None, of each teacher."""
    heads = (
        list(given) if isinstance(given, (list, tuple)) else [given] if given is not None else [None] * len(teachers)
    )
    heads = [checked_head("teacher_head", one) for one in heads]
    if len(heads) != len(teachers):
        msg = f"teacher_head must be one for each of the {len(teachers)} teachers, or None, got {len(heads)}"
        raise ValueError(msg)
    for teacher, head in zip(teachers, heads, strict=True):
        if head is not None and isinstance(teacher, Reader):
            msg = "teacher_head: a cached teacher has no output projection, give None"
            raise ValueError(msg)
    return tuple(heads)


def check_options(student: nn.Module, *, causal: bool, unlabelled: int | None, accumulation_steps: int) -> None:
    """Raises where an option has no meaning, or none for this student."""
    if causal and encoder_decoder(student, Inputs()):
        name = type(unwrapped(student)).__name__
        msg = f"causal=True: {name} is an encoder-decoder model, whose logits are aligned with its labels already"
        raise ValueError(msg)
    if unlabelled is not None and (isinstance(unlabelled, bool) or not isinstance(unlabelled, int)):
        msg = f"unlabelled must be a label, an int, or None, got {type(unlabelled).__name__}"
        raise TypeError(msg)
    if unlabelled == IGNORED:
        msg = f"unlabelled must be another label than {IGNORED}, which drops a token from every term"
        raise ValueError(msg)
    if accumulation_steps < 1:
        msg = f"accumulation_steps must be at least 1, got {accumulation_steps}"
        raise ValueError(msg)
