"""Relational knowledge distillation: distances between pairs and angles between triplets of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import smooth_l1_loss

from kdfast.methods.loss import Value
from kdfast.methods.relation.distances import pairwise_distances
from kdfast.methods.relation.features import Relation
from kdfast.methods.schedule import Setting

CHUNK = 1 << 20  # angles that exist at a time


class RKD(Relation):
    """distance * L_D + angle * L_A, relations of two and of three samples.

    L_D = mean_ij h(d_ij(S) - d_ij(T)) over all B^2, d_ij = |x_i - x_j| / mean_{i != j} |x_i - x_j|;
    L_A = mean_ijk h(cos_ijk(S) - cos_ijk(T)) over all B^3, cos_ijk the cosine at x_j of the angle to x_i and x_k, 0
    where one of them coincides with x_j; h(u) = u^2 / 2 up to an absolute value of 1, |u| - 1/2 beyond (SmoothL1). Both
    are 0 where student and teacher are equal, and invariant to scaling, rotation and translation of either space.

    The means are those of the authors' code. Its mean of positive distances is one over all pairs i != j, as equation 5
    of the paper has it: it counts samples that coincide at a distance of 1e-6, here at 0.

    Plain PyTorch, in fp64 from the distances on (a device without fp64 cannot run it). Angles follow from distances by
    the law of cosines, O(B^3) arithmetic and not O(B^3 F), a chunk of anchors at a time: O(B^2) memory and a constant,
    80 MB in all at B = 256, 220 MB at 1024. The gradient is made with the value; there is none of the second order.
    Depends on which samples share a batch, see :class:`~kdfast.methods.relation.features.Relation`.

    When to use:
        Embedding models and metric learning, or beside KD on classifiers: distances and angles do not care for
        width, and no projector has to be learned. With tiny students or large weights single runs have
        collapsed in our comparison: look at the term.

    Cost:
        Angles are O(B^3) arithmetic: a batch of 256 is fine, one of 4096 is not; set ``angle`` to 0 there.

    Args:
        student: pattern of the student's layer, features (B, ...).
        teacher: pattern of the teacher's layer; None for both: the logits.
        distance: factor of L_D; 0 leaves it out.
        angle: factor of L_A; 0 leaves it out. (RepDistiller has 25 and 50, with no change in their ratio.)
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms, beside ``distance`` and ``angle``, each before its factor.

    Raises:
        ValueError: a factor is negative, or both are 0; one pattern without the other.

    Source:
        Park et al., "Relational knowledge distillation", arXiv 1904.05068.

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> def network(hidden):
        ...     return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 5))
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(network(6), network(32), [KD(), RKD("1", "1", distance=25.0, angle=50.0)]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss', 'rkd', 'rkd.angle', 'rkd.distance']
    """

    default_name: ClassVar[str] = "rkd"

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        *,
        distance: float = 1.0,
        angle: float = 2.0,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, weight=weight, name=name)
        if not (distance >= 0 and angle >= 0 and distance + angle > 0):
            msg = f"RKD: distance and angle must be at least 0 and not both 0, got {distance} and {angle}"
            raise ValueError(msg)
        self.distance = distance
        self.angle = angle

    def compare(self, student: Tensor, teacher: Tensor) -> Value:
        s, t = pairwise_distances(student), pairwise_distances(teacher.detach())
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=s.dtype, device=s.device)
        if self.distance:
            parts["distance"] = smooth_l1_loss(_over_mean(s), _over_mean(t))
            total = total + self.distance * parts["distance"]
        if self.angle:
            parts["angle"] = _Angles.apply(s, t)  # type: ignore[no-untyped-call]
            total = total + self.angle * parts["angle"]
        return total.to(student.dtype), {part: amount.to(student.dtype) for part, amount in parts.items()}


def _over_mean(distances: Tensor) -> Tensor:
    n = distances.shape[0]
    mean = distances.sum() / (n * (n - 1))
    return distances / mean.clamp_min(torch.finfo(distances.dtype).tiny)  # where all samples are equal, 0


def _inverse(distances: Tensor) -> Tensor:
    return torch.where(distances == 0, 0.0, 1.0 / distances)


def _cosines(square: Tensor, inverse: Tensor, anchors: slice) -> Tensor:
    """Of anchors j, (j, i, k): (d_ij^2 + d_kj^2 - d_ik^2) / (2 d_ij d_kj)."""
    to = square[anchors]
    dots = to.unsqueeze(2) + to.unsqueeze(1)
    dots -= square
    dots *= (0.5 * inverse[anchors]).unsqueeze(2)
    dots *= inverse[anchors].unsqueeze(1)
    return dots


def _anchors(n: int) -> Iterator[slice]:
    step = max(1, CHUNK // (n * n))
    return (slice(first, first + step) for first in range(0, n, step))


class _Angles(torch.autograd.Function):
    """L_A of distances (B, B), with its gradient with respect to the student's."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        n = student.shape[0]
        square, inverse = student.square(), _inverse(student)
        square_t, inverse_t = teacher.square(), _inverse(teacher)
        total = torch.zeros((), dtype=student.dtype, device=student.device)
        gradient = torch.zeros_like(student)
        wanted = ctx.needs_input_grad[0]
        for anchors in _anchors(n):
            cosines = _cosines(square, inverse, anchors)
            error = cosines - _cosines(square_t, inverse_t, anchors)
            slope = error.clamp(-1.0, 1.0)  # h'(u), and h(u) = h'(u) (u - h'(u) / 2)
            total += (slope * (error - 0.5 * slope)).sum()
            if wanted:
                inv = inverse[anchors]
                # d cos / d d_ij = 1 / d_kj - cos / d_ij, twice, as i and k may change places, where d_ij is not 0.
                straight = torch.bmm(slope, inv.unsqueeze(2)).squeeze(2)
                turned = cosines.mul_(slope).sum(dim=2)
                gradient[anchors] += 2.0 * (straight - turned * inv) * (inv > 0)
                # d cos / d d_ik = -d_ik / (d_ij d_kj)
                slope *= inv.unsqueeze(2)
                gradient -= student * torch.einsum("jik,jk->ik", slope, inv)
        ctx.save_for_backward(gradient / n**3)
        return total / n**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None
