"""The arguments that the operators of every loss take, as a schema and by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.spec.head import Cap

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Arguments that the operators of every loss take. student (..., V); teachers (..., >= columns) each; teacher_weights
# fp32, (n,) or (n, ...); labels (...) int64; counted (...) bool; temperature 0-d; backend a key of LAUNCHERS; c_soft,
# c_hard and c_z (...) fp32. A sparse teacher has kept_ids (..., K) int32, kept_values (..., K) and kept_per_row (...)
# fp32, kept_columns the columns that it had, and tail_rule, one of TAIL_RULES; "" where there is none. A packed one,
# for Triton only, has kept_packed, the bytes of all tokens, of kept_size entries each in steps of 2^-kept_grid nats:
# kept_ids is then (..., 2) int32, offset and k_eff, and kept_values (...), the top.
INPUTS = (
    "Tensor[] teachers, Tensor? teacher_weights, Tensor? labels, Tensor? counted, Tensor temperature, "
    "str[] names, float[] weights, float[] parameters, bool mix_logits, int columns, float label_smoothing, "
    "str backend, Tensor? kept_ids, Tensor? kept_values, Tensor? kept_per_row, int kept_columns, str tail_rule, "
    "Tensor? kept_packed, int kept_size, int kept_grid"
)


class Inputs(NamedTuple):
    """The arguments in ``INPUTS``, in order."""

    teachers: list[Tensor]
    teacher_weights: Tensor | None
    labels: Tensor | None
    counted: Tensor | None
    temperature: Tensor
    names: list[str]
    weights: list[float]
    parameters: list[float]
    mix_logits: bool
    columns: int
    label_smoothing: float
    backend: str
    kept_ids: Tensor | None = None
    kept_values: Tensor | None = None
    kept_per_row: Tensor | None = None
    kept_columns: int = 0
    tail_rule: str = ""
    kept_packed: Tensor | None = None
    kept_size: int = 0
    kept_grid: int = 0
    # Not an argument of the operators, whose logits are stored: the heads' operators give it to a launcher.
    caps: tuple[Cap, ...] = ()  # of the student and each teacher, where the tensors hold products; () where none does

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there: what a second backward reads, and autograd must know the version of."""
        given = (x for x in self if isinstance(x, Tensor))
        return (*self.teachers, *given)

    @property
    def taught(self) -> bool:
        """Whether there is a distillation term."""
        return bool(self.teachers) or self.kept_ids is not None

    @property
    def student_cap(self) -> Cap:
        """How the student's logits follow from its tensor."""
        return self.caps[0] if self.caps else Cap()

    @property
    def softmaxes(self) -> int:
        """Distributions that the teachers have: of mixed logits, one."""
        return 1 if self.mix_logits and self.teachers else len(self.teachers)

    @property
    def sided(self) -> bool:
        """Whether kernels know the sign of p - q from sums in fp64: the total variation's, but for ensembles of q."""
        return "tvd" in self.names and self.softmaxes == 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the operators take."""
        return self[:N_INPUTS]


N_INPUTS = len(Inputs._fields) - 1


class Wants(NamedTuple):
    """What a forward call computes beside D, CE and the gradient."""

    z: bool  # logsumexp^2
    dtau: bool  # the derivative of D by the temperature
    observed: bool = False  # what metrics are made of


#: Numbers of ``observed`` per token: the fields of :class:`kdfast.spec.reduction.Observed`.
N_OBSERVED = 5


def stats_size(inputs: Inputs) -> int:
    """Numbers saved per token, in the kernel's layout: 6 of the student, 2 of each softmax of a teacher, 4 of sides.

    The Triton kernel also saves 2 of kept columns, which the other one finds again: pass 1 alone sums up their tail.
    """
    kept = inputs.kept_ids is not None and inputs.backend == "triton"
    return 6 + 2 * (inputs.softmaxes + kept) + 4 * inputs.sided
