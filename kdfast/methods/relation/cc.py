"""Correlation congruence: kernel matrices of the batch in each space."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdfast.methods.relation.embedding import check_dim, embedding
from kdfast.methods.relation.features import Relation, unit_rows
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step


class CC(Relation):
    """mean_ij (K_ij(S) - K_ij(T))^2 over all B^2, K the Gaussian kernel of unit rows as a Taylor series.

    K_ij = exp(-2 gamma) sum_{p = 0}^{order} (2 gamma)^p / p! (x_i . x_j)^p, which tends to exp(-gamma |x_i - x_j|^2)
    for |x_i| = |x_j| = 1. 0 where student and teacher are equal; invariant to rotation and to scaling of rows.

    ``mode="differences"`` is what RepDistiller calls CC, of code that the authors sent it: no kernel, but
    1 / (B - 1) sum_b sum_c |D_bc| |D_{b+1,c}|, D = e_S(S) - e_T(T), neighbours in the batch, with learned linear heads
    e to ``dim``. The formula of the paper is the default: it needs no heads, which may make the other 0 by themselves,
    and does not depend on the order of the batch. ``differences`` is 0 at equality only where the heads agree.

    Plain PyTorch, O(B^2 F). Depends on which samples share a batch, see
    :class:`~kdfast.methods.relation.features.Relation`.

    When to use:
        As :class:`SP`, with a Gaussian kernel, by which near pairs count more than far ones. Its values are small:
        give it a weight of its own.

    Cost:
        Two matrices (B, B); heads for ``"differences"``.

    Args:
        student: pattern of the student's layer, features (B, ...).
        teacher: pattern of the teacher's layer; None for both: the logits.
        mode: ``"kernel"`` or ``"differences"``.
        gamma: > 0, of the kernel.
        order: >= 1, last power of the series.
        dim: width of the heads of ``"differences"``.
        seed: of the heads.
        weight: factor in the objective, a number or a schedule. The default is RepDistiller's, for ``"differences"``;
            the kernel's loss is below 1 and usually small, so that it bears a much larger one.
        name: in the logged terms.

    Raises:
        ValueError: a mode of another name, gamma not positive, order or dim below 1; one pattern without the other.

    Source:
        Peng et al., "Correlation congruence for knowledge distillation", arXiv 1904.01802 (gamma 0.4, order 2).

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> def network(hidden):
        ...     return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 5))
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(network(6), network(32), [KD(), CC("1", "1", weight=100.0)]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['cc', 'kd', 'kd.hard', 'kd.soft', 'loss']
    """

    default_name: ClassVar[str] = "cc"

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        *,
        mode: str = "kernel",
        gamma: float = 0.4,
        order: int = 2,
        dim: int = 128,
        seed: int = 0,
        weight: Setting = 0.02,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, weight=weight, name=name)
        if mode not in ("kernel", "differences"):
            msg = f'CC: mode must be "kernel" or "differences", got {mode!r}'
            raise ValueError(msg)
        if not (gamma > 0 and math.isfinite(gamma)):
            msg = f"CC: gamma must be positive, got {gamma}"
            raise ValueError(msg)
        if order < 1:
            msg = f"CC: order must be at least 1, as a constant kernel compares nothing, got {order}"
            raise ValueError(msg)
        check_dim("CC", dim)
        self.mode = mode
        self.gamma = gamma
        self.order = order
        self.dim = dim
        self.seed = seed
        self.prepared = mode == "kernel"
        self.student_head: nn.Linear | None = None
        self.teacher_head: nn.Linear | None = None

    def prepare(self, step: Step) -> None:
        student, teacher = self.features(step)
        generator = torch.Generator().manual_seed(self.seed)
        self.student_head = embedding(student, self.dim, generator)
        self.teacher_head = embedding(teacher, self.dim, generator)
        self.prepared = True

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach()
        if self.mode == "kernel":
            return (self._kernel(student) - self._kernel(teacher)).square().mean()
        if self.student_head is None or self.teacher_head is None:
            msg = 'CC(mode="differences") has heads that follow from a batch\'s shapes: call d.prepare(batch) first'
            raise RuntimeError(msg)
        dtype = self.student_head.weight.dtype
        difference: Tensor = (self.student_head(student.to(dtype)) - self.teacher_head(teacher.to(dtype))).abs()
        return (difference[:-1] * difference[1:]).sum(dim=1).mean()

    def _kernel(self, x: Tensor) -> Tensor:
        unit = unit_rows(x)
        cosines = unit @ unit.T
        term = torch.full_like(cosines, math.exp(-2.0 * self.gamma))
        total = term
        for p in range(1, self.order + 1):
            term = term * cosines * (2.0 * self.gamma / p)
            total = total + term
        return total
