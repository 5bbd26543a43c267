"""Logits whose classes are another axis than the last, as those of images (B, C, H, W) are: the last, and back."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops.dense.cpu import fresh_gradient
from kdfast.ops.dense.inputs import KERNEL_DTYPES
from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.problem import Logits, Teacher
from kdfast.spec.sparse import SparseTargets
from kdfast.spec.values import check_memory, plain
from kdfast.views import EXTENSION_MISSING, _core, view


def check_class_dim(class_dim: object) -> None:
    """Raise TypeError for what is no axis of any tensor."""
    if isinstance(class_dim, bool) or not isinstance(class_dim, (int, numbers.Integral)):
        msg = f"class_dim must be an int, the axis of the classes, got {class_dim!r}"
        raise TypeError(msg)


def classes_last(
    student: Logits, teacher: Teacher | None, labels: Tensor | None, class_dim: int, *, views: bool
) -> tuple[Logits, Teacher | None, Tensor | None]:
    """Student, teachers and class probabilities with their classes as the last axis; views if wanted, or faster copies.

    Raises:
        TypeError: a ``class_dim`` that is no int.
        ValueError: one that is no axis of the student, or heads or sparse targets, whose classes are the last axis.
    """
    check_class_dim(class_dim)
    axes = len(student.shape) if isinstance(student, (Tensor, LMHead)) else 0
    if not axes:
        return student, teacher, labels  # to be refused
    if not -axes <= class_dim < axes:
        msg = f"class_dim must be an axis of the student, {-axes} to {axes - 1}, got {class_dim}"
        raise ValueError(msg)
    dim = int(class_dim) % axes
    if dim == axes - 1:
        return student, teacher, labels

    def moved(name: str, x: Any) -> Any:
        if isinstance(x, LMHead | SparseTargets | PackedTargets):
            msg = f"class_dim: {name} is {type(x).__name__}, whose classes are the last axis: pass class_dim=-1"
            raise ValueError(msg)
        if not isinstance(x, Tensor) or x.dim() != axes:
            return x  # to be refused
        check_memory(name, x)
        return x.movedim(dim, -1) if views else _to_last(x, dim)

    if isinstance(labels, Tensor) and labels.is_floating_point():
        labels = moved("labels", labels)
    if isinstance(teacher, Sequence) and not isinstance(teacher, str):
        return moved("student", student), [moved(f"teacher[{k}]", t) for k, t in enumerate(teacher)], labels
    return moved("student", student), moved("teacher", teacher), labels


def _to_last(x: Tensor, dim: int) -> Tensor:
    """``x.movedim(dim, -1)``, contiguous where the CPU's kernel moves it: torch takes several times a loss for that."""
    last = x.movedim(dim, -1)
    served = x.device.type == "cpu" and x.dtype in KERNEL_DTYPES and EXTENSION_MISSING is None
    if not served or not plain(x) or not x.is_contiguous() or last.is_contiguous():
        return last
    return _Moved.apply(x, dim, x.dim() - 1)  # type: ignore[no-any-return,no-untyped-call]


class _Moved(torch.autograd.Function):
    """An axis moved from one place to another, one of which is the last; contiguous, and so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: int, target: int) -> Tensor:
        ctx.places = target, source
        x = x.contiguous()
        out = fresh_gradient(x.movedim(source, target))
        outer = x.shape[: min(source, target)].numel()
        columns = x.shape[source:].numel() // x.shape[source] if source < target else x.shape[source]
        if out.numel():
            whole, moved = x.view(outer, -1, columns), out.view(outer, columns, -1)
            _core.transpose(view(whole), view(moved), torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Moved.apply(grad, *ctx.places), None, None  # type: ignore[no-untyped-call]
