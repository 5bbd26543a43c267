"""The public loss: ``distill_loss`` and its module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from kdfast.ops import _registry
from kdfast.ops.classes import check_class_dim, classes_last
from kdfast.ops.eager import in_graphs
from kdfast.spec.divergence import DivergenceLike
from kdfast.spec.head import LMHead
from kdfast.spec.problem import Logits, Reduction, Teacher, build_problem
from kdfast.spec.reduction import DistillTerms

if TYPE_CHECKING:  # what follows tells a type checker which of two types a call returns
    from typing_extensions import Unpack

    class Options(TypedDict, total=False):
        """The keyword arguments of :func:`distill_loss` but those that decide what it returns."""

        divergence: DivergenceLike
        temperature: float | Tensor
        alpha: float | Tensor | None
        scale_t2: bool
        ignore_index: int
        label_smoothing: float
        z_loss: float | Tensor
        weights: Tensor | None
        reduction: Reduction
        num_items: float | Tensor | None
        teacher_weights: Tensor | Sequence[float] | None
        ensemble: Literal["prob", "logit"]
        teacher_grad: bool
        vocab: Literal["strict", "truncate"]
        tail: Literal["bucket", "renorm", "zero"]
        overwrite_logits: bool
        memory_budget: int | None
        class_dim: int
        backend: str | None


@overload
def distill_loss(
    student: Logits,
    teacher: Teacher | None = ...,
    labels: Tensor | None = ...,
    *,
    return_terms: Literal[False] = ...,
    return_metrics: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def distill_loss(
    student: Logits,
    teacher: Teacher | None = ...,
    labels: Tensor | None = ...,
    *,
    return_terms: Literal[True],
    return_metrics: bool = ...,
    **options: Unpack[Options],
) -> DistillTerms: ...
@overload
def distill_loss(
    student: Logits,
    teacher: Teacher | None = ...,
    labels: Tensor | None = ...,
    *,
    return_terms: bool = ...,
    return_metrics: Literal[True],
    **options: Unpack[Options],
) -> DistillTerms: ...
@in_graphs
def distill_loss(
    student: Logits,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    *,
    return_terms: bool = False,
    return_metrics: bool = False,
    class_dim: int = -1,
    backend: str | None = None,
    **options: Any,
) -> Tensor | DistillTerms:
    r"""Distillation loss of a student on a teacher and on hard labels.

    With p = softmax(student / temperature) and q = softmax(teacher / temperature), per token::

        loss = alpha * temperature^2 * D(q, p) + (1 - alpha) * CE(student, labels) + z_loss * logsumexp(student)^2

    D is in nats and 0 where p = q, so with the default ``forward_kl`` it differs from a soft cross-entropy by the
    teacher's entropy, and its mean is over tokens, never over columns. fp32, bf16 and fp16 logits are read as they are
    and computed with in fp32; gradients come back in the dtype of their logits.

    Args:
        student: (..., V) floating point logits, or a :class:`kdfast.LMHead` that describes them. DTensors, and heads of
            them, are served where they lie, see :func:`kdfast.distributed.distill_dtensors`.
        teacher: (..., V) logits, an LMHead, :class:`kdfast.SparseTargets`, :class:`kdfast.PackedTargets` (Triton
            unpacks them in registers, the other backends before they begin), or a sequence of logits and LMHeads (an
            ensemble); None for plain cross-entropy.
        labels: (...) int64, already aligned with the logits: kdfast never shifts them. Or class probabilities y >= 0
            (mixup, cutmix), (..., V) floating point, detached, whose CE is -sum y log p, as in
            :func:`torch.nn.functional.cross_entropy`; kernels take a second pass over the logits for that.
        divergence: a name, a :class:`kdfast.Divergence`, or a mapping of either to its weight in a mixture.
        temperature: > 0, a float or a 0-d tensor, which may require grad.
        alpha: weight of the distillation term in [0, 1]: float, 0-d tensor, or (...) per token, where 1 marks an
            unlabelled token, whose label is not read. None: 0.5 with labels and teacher, 1 without labels, 0 without
            teacher; another value there raises.
        scale_t2: multiply the distillation term by temperature^2, so that its gradient keeps its size.
        ignore_index: a token with this label is dropped from every term.
        label_smoothing: in [0, 1]: share of the hard target spread evenly over the columns whose logit is not -inf.
        z_loss: factor of logsumexp(student)^2, >= 0; float or 0-d tensor.
        weights: (...) per token; 0 drops the token, whatever its logits hold.
        reduction: "mean": sum(w * loss) / sum(w) over counted tokens; "sum"; "none": w * loss per token.
        num_items: replaces the denominator of the mean: the tokens of all micro-batches under gradient accumulation,
            the global tokens / world size under DistributedDataParallel.
        teacher_weights: (n,) or (n, ...) weights of an ensemble, normalised; equal by default.
        ensemble: "prob": q = sum w_k softmax(t_k / temperature); "logit": q = softmax(sum w_k t_k / temperature).
        teacher_grad: send gradients to the teacher too; otherwise it is detached.
        vocab: "strict" raises where vocabularies differ; "truncate" renormalises p and q over the common leading
            columns for the distillation term, and leaves CE and z-loss on the student's whole vocabulary.
        tail: topk and topp targets only: "bucket" adds one outcome for all that was not kept, "renorm" scales what
            was kept to 1, "zero" ignores the rest.
        overwrite_logits: write the gradient over the student's logits, which then hold nothing else: saves the
            second full-size buffer. Under torch.compile and torch.func transforms it has no effect.
        memory_budget: bytes for one chunk of an LMHead's logits; None: a constant of device and dtype.
        return_terms: return :class:`DistillTerms` (loss, soft, hard, z) in place of the loss.
        return_metrics: return them with :class:`Metrics` for the training log (accuracy, agreement, student_entropy,
            teacher_entropy), found in the pass that computes the loss.
        class_dim: the axis of the classes of student and teachers: 1 for images (B, C, H, W), as
            :func:`torch.nn.functional.cross_entropy` has it, with labels and other tensors per token (B, H, W). Where
            the classes do not lie side by side in memory, the CPU's kernel reads them as they lie, and the others
            copies. Heads and sparse targets have the last.
        backend: "reference", "cpu", "triton", "cuda", or None for the best one that serves the call; wins over the
            environment's KDFAST_BACKEND.
        **options: those from ``divergence`` to ``memory_budget``, as the signature has them.

    Returns:
        The loss, fp32 (fp64 for an fp64 student): 0-d, or (...) with ``reduction="none"``.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or value that cannot be meant, labels out of range (on the CPU).
        RuntimeError: a named backend that cannot serve the call.

    Source:
        Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531.

    Example:
        >>> student = torch.zeros(2, 5, requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 2.0, 0, 0]])
        >>> loss = distill_loss(student, teacher, torch.tensor([0, 2]), temperature=2.0, alpha=0.9)
        >>> loss.backward()
        >>> round(loss.item(), 3), tuple(student.grad.shape)
        (0.401, (2, 5))
    """
    for name in options:
        if name not in _OPTIONS:
            msg = f"distill_loss() got an unexpected keyword argument {name!r}; it takes {', '.join(_OPTIONS)}"
            raise TypeError(msg)
    options |= {"return_terms": return_terms, "return_metrics": return_metrics}
    if type(student) is not Tensor and _is_dtensor(student.hidden if isinstance(student, LMHead) else student):
        return _of_dtensors(student, teacher, labels, class_dim, backend=backend, **options)
    if class_dim != -1:
        student, teacher, labels = classes_last(student, teacher, labels, class_dim)
    problem = build_problem(student, teacher, labels, **options)
    terms = _registry.select(problem, backend).distill_loss(problem)
    return terms if return_terms or return_metrics else terms.loss


def _signature() -> inspect.Signature:
    """What ``distill_loss`` takes: the options are those of ``build_problem``, which has them and their defaults."""
    mine = inspect.signature(distill_loss)
    first = [p for p in mine.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    last = [p for p in mine.parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = {p.name for p in last} | {"of_shard"}
    of_problem = inspect.signature(build_problem).parameters.values()
    options = [p for p in of_problem if p.kind is p.KEYWORD_ONLY and p.name not in known]
    return mine.replace(parameters=[*first, *options, *last])


distill_loss.__signature__ = _signature()  # type: ignore[attr-defined]
_OPTIONS = tuple(name for name, p in inspect.signature(distill_loss).parameters.items() if p.kind is p.KEYWORD_ONLY)


def _is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # whoever holds a DTensor has imported it
    return module is not None and isinstance(x, module.DTensor)


def _of_dtensors(
    student: Logits, teacher: Any, labels: Tensor | None, class_dim: int, **options: Any
) -> Tensor | DistillTerms:
    from kdfast import distributed

    if class_dim != -1:
        msg = (
            f"class_dim={class_dim}: DTensors have their classes on the last axis: move it before they are distributed"
        )
        raise ValueError(msg)
    return distributed.distill_dtensors(student, teacher, labels, **options)


_PER_CALL = ("student", "teacher", "labels", "return_terms")


def option_names() -> list[str]:
    """The options of :func:`distill_loss` that may be set once for many calls, in their order."""
    return [name for name in inspect.signature(distill_loss).parameters if name not in _PER_CALL]


class DistillLoss(nn.Module):
    """:func:`kdfast.distill_loss` with its options set once.

    An ``nn.Parameter`` among the options, such as a learned temperature, becomes a parameter of the module and another
    tensor a buffer, so ``.to()``, ``deepcopy`` and pickling treat them as they should. Options of one call, such as
    ``weights`` or ``num_items``, may be given to ``forward``, where they win.

    Args:
        **options: the keyword arguments of :func:`kdfast.distill_loss` but ``return_terms``.

    Raises:
        TypeError: an option that ``distill_loss`` does not have.
        ValueError: an option whose value is wrong whatever the tensors.

    Example:
        >>> criterion = DistillLoss(divergence="jsd", temperature=2.0)
        >>> round(criterion(torch.zeros(2, 5), torch.zeros(2, 5)).item(), 6)
        0.0
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = option_names()
        for name, value in options.items():
            if name not in known:
                msg = f"DistillLoss got an unknown option {name!r}; it takes {', '.join(known)}"
                raise TypeError(msg)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
        self.options = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
        probe = torch.zeros(1, 2)
        # of a number in a tensor the value is looked at, too; one per token is of the tokens that come
        numbers = {k: v for k, v in options.items() if isinstance(v, Tensor) and v.dim() == 0}
        of_tensors = ("teacher_weights", "class_dim", "backend")
        fixed = {k: v for k, v in (self.options | numbers).items() if k not in of_tensors}
        check_class_dim(self.options.get("class_dim", -1))
        if self.options.get("backend") is not None:
            _registry.check_name(self.options["backend"], "backend")
        build_problem(
            probe, probe, torch.zeros(1, dtype=torch.int64), **fixed
        )  # raises now what every call would raise

    def forward(
        self, student: Logits, teacher: Teacher | None = None, labels: Tensor | None = None, **options: Any
    ) -> Tensor | DistillTerms:
        """The loss; arguments as in :func:`kdfast.distill_loss`."""
        tensors = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        merged: Any = {**self.options, **tensors, **options}
        loss: Tensor | DistillTerms = distill_loss(student, teacher, labels, **merged)
        return loss

    def extra_repr(self) -> str:
        """The options that were set."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


DistillLoss.__module__ = "kdfast"  # where it is for users, and for what they pickle
