"""What a distillation loss is: a mean over examples or tokens, with a weight that may change over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

from torch import Tensor, nn

from kdfast.methods.schedule import Setting, checked
from kdfast.methods.step import Step

#: A loss's value, with what else it wants logged by name.
Value: TypeAlias = Tensor | tuple[Tensor, dict[str, Tensor]]


class Loss(nn.Module):
    """Base of the losses of :mod:`kdfast.methods`.

    ``forward(step)`` returns the unweighted value, 0-d: the mean over the batch's examples or counted tokens, in fp32,
    or that and a dict of parts to log. A loss with parameters is a module like any other; those whose shapes follow
    from the layers it compares are made in ``prepare``.

    Args:
        weight: factor of the loss in the objective, a number or a schedule.
        name: in the logged terms; the class's by default.

    Raises:
        TypeError: ``weight`` is neither a number nor a schedule.
        ValueError: it is not finite.
    """

    default_name: ClassVar[str] = "term"
    #: Whether parameters are made from the shapes of a first batch.
    needs_shapes: ClassVar[bool] = False
    #: Whether the mean is over labelled tokens alone, so that one without a hard label is dropped.
    labelled_only: ClassVar[bool] = False

    def __init__(self, *, weight: Setting = 1.0, name: str | None = None) -> None:
        super().__init__()
        self.weight = checked("weight", weight)
        self.name = name or self.default_name
        #: Patterns of the layers to capture, see :mod:`kdfast.methods.layers`.
        self.student_layers: tuple[str, ...] = ()
        self.teacher_layers: tuple[str, ...] = ()
        self.prepared = not self.needs_shapes

    def prepare(self, step: Step) -> None:
        """Makes the parameters whose shapes follow from a batch; called once, with outputs that carry no gradient."""
        self.prepared = True

    def forward(self, step: Step) -> Value:
        raise NotImplementedError


class Term(Loss):
    """A plain callable as a loss.

    Args:
        function: of a :class:`kdfast.methods.Step`, returning what :class:`Loss` says of ``forward``.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms; the function's by default.

    Example:
        >>> size = Term(lambda step: step.student_logits().square().mean(), weight=1e-4, name="logit_size")
        >>> size.name
        'logit_size'
    """

    def __init__(self, function: Callable[[Step], Value], *, weight: Setting = 1.0, name: str | None = None) -> None:
        given = getattr(function, "__name__", type(function).__name__)
        super().__init__(weight=weight, name=name or (self.default_name if given == "<lambda>" else given))
        self.function = function

    def forward(self, step: Step) -> Value:
        return self.function(step)


#: What is taken as a loss: one, a function of a step, or that and its weight.
LossLike: TypeAlias = Loss | Callable[[Step], Value] | tuple[Callable[[Step], Value], Setting]


def as_loss(given: LossLike) -> Loss:
    """A loss of what a user gives as one.

    Raises:
        TypeError: something else.
    """
    if isinstance(given, Loss):
        return given
    if isinstance(given, tuple) and len(given) == 2 and callable(given[0]):
        function, weight = given
        if isinstance(function, Loss):
            msg = f"{type(function).__name__} takes its weight itself: {type(function).__name__}(weight=...)"
            raise TypeError(msg)
        return Term(function, weight=weight)
    if isinstance(given, type):
        msg = f"a loss must be an object, got the class {given.__name__}: give {given.__name__}()"
        raise TypeError(msg)
    if callable(given):
        return Term(given)
    msg = f"a loss must be a kdfast.methods.Loss, a callable, or (callable, weight), got {type(given).__name__}"
    raise TypeError(msg)


def named(losses: Sequence[Loss]) -> dict[str, Loss]:
    """By name; of equal names, the later ones are numbered from 2. ``loss`` is the objective's."""
    names: dict[str, Loss] = {}
    for loss in losses:
        name, n = loss.name, 1
        while name in names or name == "loss":
            n += 1
            name = f"{loss.name}_{n}"
        names[name] = loss
    return names
