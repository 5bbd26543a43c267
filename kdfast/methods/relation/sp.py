"""Similarity-preserving distillation: which samples of a batch have similar features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdfast.methods.relation.features import Relation, unit_rows, unit_scale
from kdfast.methods.schedule import Setting


class SP(Relation):
    """|| G(S) - G(T) ||_F^2 / B^2, G = the rows of X X' over their L2 norm.

    0 where student and teacher are equal; invariant to rotation and to scaling of either space. Plain PyTorch,
    O(B^2 F). Depends on which samples share a batch, see :class:`~kdfast.methods.relation.features.Relation`.

    When to use:
        CNN classifiers, beside labels: examples that the teacher's features find alike should be alike to the
        student's. Nothing is trained along. Its weight of 3000 is for CNNs; on transformers it has hurt.

    Cost:
        Two matrices (B, B).

    Args:
        student: pattern of the student's layer, features (B, ...).
        teacher: pattern of the teacher's layer; None for both: the logits.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: one pattern without the other.

    Source:
        Tung and Mori, "Similarity-preserving knowledge distillation", arXiv 1907.09682 (weight 3000).

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> def network(hidden):
        ...     return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 5))
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(network(6), network(32), [KD(), SP("1", "1")]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss', 'sp']
    """

    default_name: ClassVar[str] = "sp"

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        *,
        weight: Setting = 3000.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, weight=weight, name=name)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = _similarities(student) - _similarities(teacher.detach())
        return difference.square().mean()


def _similarities(x: Tensor) -> Tensor:
    x = unit_scale(x)
    return unit_rows(x @ x.T)
