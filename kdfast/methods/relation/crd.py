"""Contrastive representation distillation, with its memory of every sample's embeddings."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdfast.methods.loss import Value
from kdfast.methods.relation.contrast import contrast, scores
from kdfast.methods.relation.embedding import check_dim, embedding
from kdfast.methods.relation.features import Relation
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step


class OtherClasses:
    """Draws samples whose class is another.

    Args:
        labels: (N,) int64.
        samples: N.

    Raises:
        TypeError: labels that are not int64.
        ValueError: another shape, or one class alone.
    """

    def __init__(self, labels: Tensor, samples: int) -> None:
        if labels.dtype != torch.int64:
            msg = f"CRD: labels must be int64, got {labels.dtype}"
            raise TypeError(msg)
        if labels.shape != (samples,):
            msg = f"CRD: labels must be ({samples},), one a sample of the data set, got {tuple(labels.shape)}"
            raise ValueError(msg)
        _, of, counts = labels.unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            msg = "CRD: labels must have two classes or more: a negative is of another class than its sample"
            raise ValueError(msg)
        self.order = of.argsort()  # class by class
        self.first = (counts.cumsum(0) - counts)[of]  # of each sample's class, where it begins in the order
        self.size = counts[of]

    def draw(self, index: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(B, count) positions, uniform among the samples of other classes than those at ``index``."""
        self.order, self.first, self.size = (x.to(index.device) for x in (self.order, self.first, self.size))
        first, size = self.first[index].unsqueeze(1), self.size[index].unsqueeze(1)
        others = len(self.order) - size
        u = torch.rand(len(index), count, generator=generator, dtype=torch.float64, device=index.device)
        drawn = torch.minimum((u * others).long(), others - 1)
        found: Tensor = self.order[torch.where(drawn < first, drawn, drawn + size)]
        return found


class CRD(Relation):
    """Tells each sample's pair of embeddings from K negatives of a memory, from the student's side and the teacher's.

    L = L_S + L_T, L_S = -1/B sum_b [log h(s_b, m_b) + sum_{k=1}^{K} log(1 - h(s_b, m_k))], m the memory of the
    teacher's embeddings, h(s, m) = p / (p + K / N), p = exp(s . m / tau) / Z; L_T is the same with the sides exchanged.
    s and t are the features through learned linear heads, over their L2 norm. Z is N times the mean of exp(s . m / tau)
    in the first batch, and kept. Negatives are drawn uniformly with replacement: with ``labels`` from the
    samples of other classes than the positive's, as the authors' experiments do, without from all samples, the positive
    among them or not. With few classes the difference matters: a negative of the same class pushes apart what should be
    alike. After each batch the memory of its samples is momentum * m + (1 - momentum) * s, over its norm. The loss is
    not 0 where student and teacher are equal: it is lower the better pairs are told from others.

    :meth:`kdfast.Distiller.prepare` makes the heads, whose parameters belong in the optimizer. The memories (N x dim
    each, so 2 x 4 x N x dim bytes), the Zs and the number of draws are in ``state_dict``: a run that goes on from a
    checkpoint is the uninterrupted run, bit for bit (on a GPU under ``torch.use_deterministic_algorithms``, and with no
    position twice in a batch). Under ``torch.no_grad``, as in validation, the loss is computed and nothing kept.

    Plain PyTorch, of fp32 heads and memory; the gradient with respect to the embeddings is made with the value, there
    is none of the second order. A step takes O(B (K + N)) of memory for N up to 8 K and O(B K) beyond, never
    (B, K, dim). The memory moves on with every batch, so micro-batches do not sum to the large batch. Under
    DistributedDataParallel each rank has its own memory and Zs, with what it has seen itself, and so its own
    ``state_dict``; the heads are broadcast and their gradients averaged, so ``seed`` may differ by rank.

    When to use:
        Classifiers with much data and a student that has room for it: each sample's embedding must tell its own
        teacher's from thousands of others. Give it the labels. With 100 examples or eight hidden units it does
        harm.

    Cost:
        Two memories of N x dim, K + 1 products a sample and side, heads that are trained along, and the
        position of each sample in the batch.

    Args:
        student: pattern of the student's layer, features (B, ...).
        teacher: pattern of the teacher's layer; None for both: the logits.
        samples: N, of the data set; ``step.index`` (B,) int64 gives the positions of a batch, in [0, N).
        negatives: K, at most N.
        temperature: tau > 0.
        momentum: of the memory, in [0, 1).
        dim: width of the embeddings.
        seed: of the heads, the first memory and the draws.
        labels: (N,) int64, each sample's class by its position; not part of ``state_dict``.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms, beside ``student`` (L_S) and ``teacher`` (L_T).

    Raises:
        ValueError: an argument out of its range; in ``forward``, a batch without index, one of another shape or, on the
            CPU, out of range (on a GPU that is the device's own error).
        TypeError: an index that is not int64.
        RuntimeError: before ``prepare``.

    Source:
        Tian et al., "Contrastive representation distillation", arXiv 1910.10699 (weight 0.8).

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> def network(hidden):
        ...     return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 5))
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,)), torch.arange(16)  # positions in the data set
        >>> with Distiller(network(6), network(32), [CrossEntropy(), CRD("1", "1", samples=100, negatives=50)]) as d:
        ...     d.prepare(batch)
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'crd', 'crd.student', 'crd.teacher', 'loss']
    """

    default_name: ClassVar[str] = "crd"
    needs_shapes: ClassVar[bool] = True

    memory_student: Tensor  # (N, dim)
    memory_teacher: Tensor  # (N, dim)
    log_normalizers: Tensor  # (2,) log Z of L_S and L_T, NaN until the first batch

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        *,
        samples: int,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        dim: int = 128,
        seed: int = 0,
        labels: Tensor | None = None,
        weight: Setting = 0.8,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, weight=weight, name=name)
        if not 1 <= negatives <= samples:
            msg = f"CRD: negatives must be from 1 to the {samples} samples of the data set, got {negatives}"
            raise ValueError(msg)
        if not (temperature > 0 and math.isfinite(temperature)):
            msg = f"CRD: temperature must be positive, got {temperature}"
            raise ValueError(msg)
        if not 0 <= momentum < 1:
            msg = f"CRD: momentum must be in [0, 1), got {momentum}"
            raise ValueError(msg)
        check_dim("CRD", dim)
        self.samples = samples
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.dim = dim
        self.seed = seed
        self.draws = 0  # batches that the memory has seen
        self._classes = None if labels is None else OtherClasses(labels, samples)
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3.0 / dim)
        for side in ("memory_student", "memory_teacher"):
            self.register_buffer(side, torch.empty(samples, dim).uniform_(-bound, bound, generator=generator))
        self.register_buffer("log_normalizers", torch.full((2,), math.nan))
        self.student_head: nn.Linear | None = None
        self.teacher_head: nn.Linear | None = None

    def prepare(self, step: Step) -> None:
        student, teacher = self.features(step)
        generator = torch.Generator().manual_seed(_mixed(self.seed, -1))
        self.student_head = embedding(student.to(self.memory_student.dtype), self.dim, generator)
        self.teacher_head = embedding(teacher.to(self.memory_teacher.dtype), self.dim, generator)
        self.prepared = True

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.draws = int(state)

    def forward(self, step: Step) -> Value:
        if self.student_head is None or self.teacher_head is None:
            msg = "CRD has heads that follow from a batch's shapes: call d.prepare(batch) first"
            raise RuntimeError(msg)
        student, teacher = self.features(step)
        index = self._index(step, student)
        dtype = self.student_head.weight.dtype
        with torch.autocast(student.device.type, enabled=False):
            if not len(index):
                return (student * 0.0).sum().to(dtype)
            s = normalize(self.student_head(student.to(dtype)), dim=1)
            t = normalize(self.teacher_head(teacher.detach().to(dtype)), dim=1)
            positions = self._draw(index)
            keep = torch.is_grad_enabled()
            with torch.no_grad():
                raw_s = scores(s, self.memory_teacher, positions)
                raw_t = scores(t, self.memory_student, positions)
                log_z = self._normalizers(raw_s, raw_t)
            loss_s = contrast(s, self.memory_teacher, positions, raw_s, log_z[0], self.temperature)
            loss_t = contrast(t, self.memory_student, positions, raw_t, log_z[1], self.temperature)
            if keep:
                self._keep(s.detach(), t.detach(), index, log_z)
        return loss_s + loss_t, {"student": loss_s, "teacher": loss_t}

    def _index(self, step: Step, student: Tensor) -> Tensor:
        index = step.index
        if index is None:
            msg = (
                "CRD needs each sample's position in the data set: batches of (inputs, labels, index), a mapping with "
                '"index", or d.loss(..., index=index)'
            )
            raise ValueError(msg)
        if index.dtype != torch.int64:
            msg = f"CRD: index must be int64, got {index.dtype}"
            raise TypeError(msg)
        if index.shape != student.shape[:1]:
            msg = f"CRD: index must be ({student.shape[0]},), one position a sample, got {tuple(index.shape)}"
            raise ValueError(msg)
        # On a GPU the look would wait for the device.
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.samples:
            msg = f"CRD: index must be in [0, {self.samples}), got {int(index.min())} to {int(index.max())}"
            raise ValueError(msg)
        return index.to(student.device)

    def _draw(self, index: Tensor) -> Tensor:
        """(B, 1 + K) positions: the sample's own, then the negatives; a function of the seed and ``draws`` alone."""
        generator = torch.Generator(index.device).manual_seed(_mixed(self.seed, self.draws))
        shape = (len(index), self.negatives)
        if self._classes is None:
            drawn = torch.randint(self.samples, shape, generator=generator, device=index.device)
        else:
            drawn = self._classes.draw(index, self.negatives, generator)
        return torch.cat([index.unsqueeze(1), drawn], dim=1)

    def _normalizers(self, raw_s: Tensor, raw_t: Tensor) -> Tensor:
        """Log Z, (2,): what is kept, or of this batch."""
        found = [
            (raw / self.temperature).flatten().logsumexp(0) - math.log(raw.numel() / self.samples)
            for raw in (raw_s, raw_t)
        ]
        return torch.where(self.log_normalizers.isnan(), torch.stack(found), self.log_normalizers)

    @torch.no_grad()
    def _keep(self, s: Tensor, t: Tensor, index: Tensor, log_z: Tensor) -> None:
        self.draws += 1
        self.log_normalizers.copy_(log_z)
        for memory, new in ((self.memory_student, s), (self.memory_teacher, t)):
            moved = self.momentum * memory[index] + (1.0 - self.momentum) * new
            memory.index_copy_(0, index, normalize(moved, dim=1))


def _mixed(seed: int, draw: int) -> int:
    """A seed of 63 bits for each draw (SplitMix64), as neighbouring seeds of one run must not be those of another."""
    x = (seed * 0x9E3779B97F4A7C15 + (draw + 2) * 0xD1B54A32D192ED03) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1
