"""Probabilistic knowledge transfer: the probability with which a sample has another for a neighbour."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdfast.methods.relation.features import Relation, unit_rows
from kdfast.methods.schedule import Setting

EPS = 1e-7  # the authors', under the logarithm


class PKT(Relation):
    """mean_ij t_ij log((t_ij + 1e-7) / (s_ij + 1e-7)), rows of (1 + cos(x_i, x_j)) / 2 over their sum.

    The mean is over all B^2, the diagonal included, as in the authors' code. 0 where student and teacher are equal;
    invariant to rotation of either space and to scaling of its rows one by one. A row of zeros has cosine 0 with all.
    Plain PyTorch, O(B^2 F). Depends on which samples share a batch, see
    :class:`~kdfast.methods.relation.features.Relation`.

    When to use:
        Embeddings for retrieval: the distribution over neighbours is taught, and neither width nor scale of the
        features matters. The safest of the relations on small classifiers in our comparison.

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
        Passalis and Tefas, "Learning deep representations with probabilistic knowledge transfer", arXiv 1803.10837
        (weight 30000 in RepDistiller).

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> def network(hidden):
        ...     return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 5))
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(network(6), network(32), [KD(), PKT("1", "1")]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss', 'pkt']
    """

    default_name: ClassVar[str] = "pkt"

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        *,
        weight: Setting = 30000.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, weight=weight, name=name)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = _neighbours(student), _neighbours(teacher.detach())
        return (t * ((t + EPS).log() - (s + EPS).log())).mean()


def _neighbours(x: Tensor) -> Tensor:
    unit = unit_rows(x)
    similar = ((1.0 + unit @ unit.T) / 2.0).clamp_min(0.0)  # rounding may bring a cosine below -1
    return similar / similar.sum(dim=1, keepdim=True)
