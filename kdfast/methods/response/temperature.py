"""A temperature that is learned against the student: curriculum temperature (CTKD)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.methods.schedule import Setting, checked, value


class LearnedTemperature(nn.Module):
    r"""tau = minimum + span * sigmoid(theta), with theta learned to make the loss larger.

    A setting: ``KD(temperature=LearnedTemperature(...))``. It is called with the optimizer step and returns tau, 0-d
    fp32. On its way back the gradient of theta is multiplied by -reversal(step), so that the optimizer that lowers the
    loss by the student raises it by theta: the task gets harder as the schedule rises. theta is one of the loss's
    parameters, so it is in :meth:`kdfast.Distiller.parameters` and its ``state_dict``.

    When to use:
        To do without a search for the temperature, when there are many epochs over which a harder task can be
        approached. With few steps theta does not get far; `kdfast tune` is the surer way.

    Cost:
        One parameter; the loss's gradient with respect to the temperature comes with the same pass over the
        logits.

    Args:
        reversal: lambda >= 0, a number or a schedule; the paper's is ``Cosine(0.0, 1.0, steps=)`` over 10 epochs.
        minimum: > 0, what tau stays above.
        span: > 0, tau stays below minimum + span.
        theta: where it starts; 1 is a temperature of 15.6.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range.

    Source:
        Li et al., "Curriculum temperature for knowledge distillation", arXiv 2211.16231 (the global temperature).

    Example:
        >>> temperature = LearnedTemperature(0.5, theta=0.0)
        >>> tau = temperature(0)
        >>> tau.backward()
        >>> tau.item(), temperature.theta.grad.item()  # -0.5 * 20 * sigmoid'(0)
        (11.0, -2.5)
    """

    def __init__(
        self, reversal: Setting = 1.0, *, minimum: float = 1.0, span: float = 20.0, theta: float = 1.0
    ) -> None:
        super().__init__()
        self.reversal = checked("reversal", reversal, 0.0)
        checked("minimum", minimum, 0.0, open_low=True)
        checked("span", span, 0.0, open_low=True)
        checked("theta", theta)
        self.minimum = minimum
        self.span = span
        self.theta = nn.Parameter(torch.tensor(float(theta)))

    def forward(self, step: int) -> Tensor:
        theta: Tensor = _Reversed.apply(self.theta, value(self.reversal, step))  # type: ignore[no-untyped-call]
        return self.minimum + self.span * torch.sigmoid(theta)


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -factor."""

    @staticmethod
    def forward(x: Tensor, factor: float | Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | Tensor], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * upstream, None
