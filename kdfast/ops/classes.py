"""Logits whose classes are another axis than the last, as those of images (B, C, H, W) are: the last, and back."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.problem import Logits, Teacher
from kdfast.spec.sparse import SparseTargets
from kdfast.spec.values import check_memory


def check_class_dim(class_dim: object) -> None:
    """Raise TypeError for what is no axis of any tensor."""
    if isinstance(class_dim, bool) or not isinstance(class_dim, (int, numbers.Integral)):
        msg = f"class_dim must be an int, the axis of the classes, got {class_dim!r}"
        raise TypeError(msg)


def classes_last(
    student: Logits, teacher: Teacher | None, labels: Tensor | None, class_dim: int
) -> tuple[Logits, Teacher | None, Tensor | None]:
    """Student, teachers and class probabilities with their classes as the last axis: views.

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
        return x.movedim(dim, -1)

    if isinstance(labels, Tensor) and labels.is_floating_point():
        labels = moved("labels", labels)
    if isinstance(teacher, Sequence) and not isinstance(teacher, str):
        return moved("student", student), [moved(f"teacher[{k}]", t) for k, t in enumerate(teacher)], labels
    return moved("student", student), moved("teacher", teacher), labels
