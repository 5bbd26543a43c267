"""The arguments of ``distill_loss``, checked once and normalised: what every backend is given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdfast.spec.divergence import DivergenceLike, Term, divergence_terms
from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets
from kdfast.spec.values import check_memory, first_largest, readable, recordable, tensors_of, with_tensors

Logits: TypeAlias = Tensor | LMHead
Teacher: TypeAlias = Logits | SparseTargets | PackedTargets | Sequence[Logits]
Reduction: TypeAlias = Literal["mean", "sum", "none"]

#: Stands in the place of a label that is not to be read, because its token is unlabelled (alpha = 1 there).
NO_LABEL = torch.iinfo(torch.int64).min


@dataclass(frozen=True, eq=False)
class Problem:
    """One checked call of ``distill_loss``. ``...`` stands for the leading axes of the student's logits."""

    student: Logits  # (..., V)
    teachers: tuple[Logits, ...]  # each (..., >= columns)
    sparse: SparseTargets | None
    packed: PackedTargets | None  # in place of sparse: who does not take it asks for unpacked()
    teacher_weights: Tensor | None  # (n,) or (n, ...), sums to 1 over its first axis; None: one teacher, or equal
    labels: Tensor | None  # (...) int64; NO_LABEL where the token is unlabelled
    probabilities: Tensor | None  # (..., V) floating point >= 0, detached: in place of labels
    answers: Tensor | None  # (...) int64, the labels or the likeliest classes: what metrics call accurate
    terms: tuple[Term, ...]
    temperature: Tensor  # 0-d
    fixed_temperature: float | None  # its value, where it was given as a number
    alpha: Tensor | float  # float, 0-d or (...)
    counted: Tensor | None  # (...) bool: the token is not dropped; None: none is
    weights: Tensor | None  # (...)
    z_loss: Tensor | float
    num_items: Tensor | float | None
    scale_t2: bool
    label_smoothing: float
    reduction: Reduction
    ensemble: Literal["prob", "logit"]
    teacher_grad: bool
    columns: int  # the leading columns that the distillation term runs over
    tail: Literal["bucket", "renorm", "zero"]
    overwrite_logits: bool
    memory_budget: int | None
    return_terms: bool
    return_metrics: bool

    @property
    def leading(self) -> torch.Size:
        """The token axes, (...)."""
        return self.student.shape[:-1]

    @property
    def vocab_size(self) -> int:
        """V of the student."""
        return self.student.shape[-1]

    @property
    def has_teacher(self) -> bool:
        """Whether there is a distillation term."""
        return bool(self.teachers) or self.kept is not None

    @property
    def labelled(self) -> bool:
        """Whether there is a cross-entropy."""
        return self.labels is not None or self.probabilities is not None

    @property
    def kept(self) -> SparseTargets | PackedTargets | None:
        """The sparse teacher, packed or not."""
        return self.sparse if self.packed is None else self.packed

    def unpacked(self) -> Problem:
        """The same call, with a packed teacher unpacked."""
        return self if self.packed is None else replace(self, sparse=self.packed.unpack(), packed=None)

    @property
    def has_z_loss(self) -> bool:
        """Whether there may be a z term: a tensor's value is not looked at."""
        return isinstance(self.z_loss, Tensor) or self.z_loss != 0.0

    @property
    def learns_temperature(self) -> bool:
        """Whether the caller wants the gradient of the temperature."""
        return self.temperature.requires_grad


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        msg = f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
        raise ValueError(msg)


def _check_logits(name: str, value: object, *, of_shard: bool = False) -> None:
    """Raise for what is no logits; those of a shard are some of the columns, and may be one."""
    if isinstance(value, LMHead):
        _check_head(name, value)
    elif not isinstance(value, Tensor):
        msg = f"{name} must be a tensor of logits (..., V) or a kdfast.LMHead, got {type(value).__name__}"
        raise TypeError(msg + hint_of_output(name, value))
    elif not value.is_floating_point():
        msg = f"{name} must be floating point logits, got {value.dtype}: pass logits, not token ids"
        raise TypeError(msg)
    elif value.dim() < 1 or value.shape[-1] == 0:
        msg = f"{name} must be (..., V) with V >= 2, got shape {tuple(value.shape)}"
        raise ValueError(msg)
    if value.shape[-1] == 1 and not of_shard:
        msg = (
            f"{name} has 1 column, whose probability is 1 whatever its logit: the loss would be 0, without a gradient; "
            "for scores, as of rewards or a regression, use torch.nn.functional.mse_loss"
        )
        raise ValueError(msg)
    for part, tensor in tensors_of(name, value):
        check_memory(part, tensor)


def hint_of_output(name: str, value: object) -> str:
    """What to pass in the place of a model's output, as the end of an error; "" where it is none."""
    logits = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    if isinstance(logits, Tensor):
        access = '["logits"]' if isinstance(value, dict) and not hasattr(value, "logits") else ".logits"
        return f": it is a model's output, pass {name}{access}"
    if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) and x.is_floating_point() for x in value):
        return f": of a model's output pass the logits, {name}.logits or the element of the tuple that holds them"
    return ""


def check_plain_logits(name: str, value: object) -> None:
    """Raise TypeError for what is no tensor, of losses that take logits in no other form."""
    if isinstance(value, Tensor):
        return
    msg = f"{name} must be a tensor of logits (..., V), got {type(value).__name__}"
    hint = f": pass {name}.logits() of a kdfast.LMHead" if isinstance(value, LMHead) else hint_of_output(name, value)
    raise TypeError(msg + hint)


def _check_head(name: str, head: LMHead) -> None:
    if not head.hidden.is_floating_point():
        msg = f"{name}: LMHead.hidden must be floating point, got {head.hidden.dtype}"
        raise TypeError(msg)
    for part, x in head._parts().items():
        if x is None:
            continue
        if type(x) is not Tensor and hasattr(x, "full_tensor"):
            msg = (
                f"{name}: {part} is a DTensor, and not all tensors of the call are: call the loss inside the "
                "forward of the module that FSDP wraps, where its parameters are whole; or make hidden a DTensor too, "
                "replicated over the ranks that share the vocabulary"
            )
            raise TypeError(msg)
        if x.device != head.hidden.device:
            msg = f"{name}: {part} is on {x.device}, hidden on {head.hidden.device}"
            raise ValueError(msg)
        if x.dtype != head.hidden.dtype and not torch.is_autocast_enabled(head.hidden.device.type):
            msg = f"{name}: {part} is {x.dtype}, hidden {head.hidden.dtype}: convert one of them, or use torch.autocast"
            raise TypeError(msg)


def device_of(x: Logits | SparseTargets | PackedTargets) -> torch.device:
    """Where a tensor, a head or targets live."""
    if isinstance(x, LMHead):
        return x.hidden.device
    return x.ids.device if isinstance(x, SparseTargets) else x.device


def _check_per_token(name: str, value: object, student: Logits) -> None:
    leading, device = student.shape[:-1], device_of(student)
    if not isinstance(value, Tensor):
        msg = f"{name} must be a tensor, got {type(value).__name__}"
        raise TypeError(msg)
    if value.shape != leading:
        msg = f"{name} must have the student's leading axes {tuple(leading)}, got {tuple(value.shape)}"
        axes = [k for k in range(len(leading)) if value.shape == (*leading[:k], *leading[k + 1 :], student.shape[-1])]
        if name == "labels" and value.dim() == len(leading) + 1:
            msg += f": pass class indices, or class probabilities as floating point {tuple(student.shape)}"
        elif axes:
            msg += f": pass class_dim={axes[-1]} where the classes are that axis of the logits {tuple(student.shape)}"
        raise ValueError(msg)
    if value.device != device:
        msg = f"{name} is on {value.device}, the student on {device}: move it with .to(student.device)"
        raise ValueError(msg)
    check_memory(name, value)


def _scalar(
    name: str, value: object, low: float = 0.0, high: float = math.inf, *, open_low: bool = False
) -> Tensor | float:
    """A number in [low, high] (or above low), NumPy's made Python's, or a 0-d tensor, looked at where it is at hand."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            msg = f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}"
            raise ValueError(msg)
        if readable(value):
            check_memory(name, value)
            _check_range(name, value.item(), low, high, open_low=open_low)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        msg = f"{name} must be a number or a 0-d tensor, got {type(value).__name__}"
        raise TypeError(msg)
    number = value if isinstance(value, (int, float)) else float(value)
    _check_range(name, number, low, high, open_low=open_low)
    return number


def recorded(number: Tensor | float) -> Tensor | float:
    """A number as it is, a tensor as autograd can save it."""
    return recordable(number) if isinstance(number, Tensor) else number


def _check_range(name: str, number: float, low: float, high: float, *, open_low: bool) -> None:
    # comparisons alone: a compiler may have made the number a symbol, which math.isfinite does not take
    inside = (low < number if open_low else low <= number) and number <= high and -math.inf < number < math.inf
    if inside:
        return
    bound = "finite"
    if low > -math.inf:
        bound = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else " and finite")
    msg = f"{name} must be {bound}, got {number!r}"
    raise ValueError(msg)


def _check_values_of_tokens(name: str, x: Tensor, high: float, *, may_be_nan: bool) -> None:
    """Raise for values per token outside [0, high], or infinite, where they are at hand.

    A NaN that may be one comes out as that token's loss, as a NaN of its logits does.
    """
    if not readable(x):
        return
    bad = (x < 0) | (x > high) | x.isinf()
    if not may_be_nan:
        bad = bad | x.isnan()
    if bool(bad.any()):
        bound = f">= 0 and {'finite' if high == math.inf else f'<= {high:g}'}"
        msg = f"{name} must be {bound}, got {x[bad][0].item()}"
        raise ValueError(msg)


def _are_probabilities(labels: object, student: Logits) -> bool:
    return isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == student.shape


def _probabilities(labels: Tensor, student: Logits, counted: Tensor | None, *, overwrite_logits: bool) -> Tensor:
    """Labels (..., V) as class probabilities, checked where they are at hand; those of a dropped token are not read."""
    if overwrite_logits:
        msg = "overwrite_logits: class probabilities as labels take a second pass over the logits: leave it False"
        raise ValueError(msg)
    if labels.device != device_of(student):
        msg = f"labels is on {labels.device}, the student on {device_of(student)}: move it with .to(student.device)"
        raise ValueError(msg)
    check_memory("labels", labels)
    if readable(labels):
        read = labels if counted is None else labels[counted]
        _check_values_of_tokens("labels", read, math.inf, may_be_nan=True)
    return recordable(labels.detach())


def _check_writable(student: Tensor) -> None:
    if any(step == 0 and size > 1 for size, step in zip(student.shape, student.stride(), strict=True)):
        msg = "overwrite_logits: the student's tokens share memory (an expanded view): pass student.contiguous()"
        raise ValueError(msg)
    if student.shape[-1] > 1 and student.stride(-1) != 1:
        msg = (
            f"overwrite_logits needs rows that are contiguous in memory, got stride {student.stride(-1)} along the "
            "vocabulary: pass student.contiguous(), or leave it False"
        )
        raise ValueError(msg)


def _split_teacher(
    teacher: Teacher | None, *, of_shard: bool
) -> tuple[tuple[Logits, ...], SparseTargets | PackedTargets | None]:
    if teacher is None:
        return (), None
    if isinstance(teacher, SparseTargets | PackedTargets):
        for part, tensor in tensors_of("teacher", teacher):
            check_memory(part, tensor)
        return (), with_tensors(teacher, recordable)
    if isinstance(teacher, (Tensor, LMHead)):
        _check_logits("teacher", teacher, of_shard=of_shard)
        return (teacher,), None
    if not isinstance(teacher, Sequence) or not teacher:
        msg = (
            "teacher must be logits (..., V), a kdfast.LMHead, kdfast.SparseTargets, kdfast.PackedTargets or a "
            f"non-empty sequence of logits or LMHeads, got {type(teacher).__name__}"
        )
        raise TypeError(msg + hint_of_output("teacher", teacher))
    for k, t in enumerate(teacher):
        if isinstance(teacher, tuple) and not isinstance(t, (Tensor, LMHead)):
            msg = f"teacher[{k}] must be a tensor of logits (..., V) or a kdfast.LMHead, got {type(t).__name__}"
            raise TypeError(msg + hint_of_output("teacher", teacher))
        _check_logits(f"teacher[{k}]", t, of_shard=of_shard)
    return tuple(teacher), None


def _columns(student: Logits, sizes: dict[str, int], vocab: str, *, of_shard: bool) -> int:
    v = student.shape[-1]
    for name, size in sizes.items():
        if size != v and vocab == "strict":
            msg = (
                f'{name} has {size} columns, student {v}: pass vocab="truncate" to distil over the first {min(size, v)}'
            )
            raise ValueError(msg)
        if size == 1 and not of_shard:
            msg = f"{name} has 1 column, and vocab={vocab!r} leaves nothing to compare the student's {v} with"
            raise ValueError(msg)
    return min([v, *sizes.values()])


def _teacher_weights(weights: object, n: int, counted: Tensor | None, student: Logits) -> Tensor | None:
    leading, device = student.shape[:-1], device_of(student)
    if weights is None:
        return torch.full((n,), 1.0 / n, device=device) if n > 1 else None
    if n == 0:
        msg = "teacher_weights needs a sequence of teachers"
        raise ValueError(msg)
    w = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float32, device=device)
    if w.shape not in ((n,), (n, *leading)):
        msg = f"teacher_weights must be ({n},) or {(n, *leading)} for {n} teachers, got {tuple(w.shape)}"
        raise ValueError(msg)
    if isinstance(weights, Tensor):
        check_memory("teacher_weights", w)
        w = recordable(w)
    if not isinstance(weights, Tensor) or readable(w):
        read = w if counted is None or w.dim() == 1 else w[:, counted]  # those of a dropped token are not looked at
        if not (bool((read >= 0).all()) and bool((read.sum(0) > 0).all())):
            msg = f"teacher_weights must be >= 0 with a positive sum, got {weights!r}"
            raise ValueError(msg)
    return w / w.sum(0) if n > 1 else None


def _alpha(alpha: object, *, labelled: bool, taught: bool, student: Logits) -> Tensor | float:
    default = 0.5 if labelled and taught else 1.0 if taught else 0.0
    if alpha is None:
        return default
    if not (labelled and taught):
        missing = "labels" if taught else "teacher"
        if isinstance(alpha, Tensor) or alpha != default:
            got = f"a tensor {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else repr(alpha)
            msg = f"alpha must be {default:g} or None without {missing}, got {got}: pass {missing} too"
            raise ValueError(msg)
        return default
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        _check_per_token("alpha", alpha, student)
        _check_values_of_tokens("alpha", alpha, 1.0, may_be_nan=False)
        return recordable(alpha)
    return recorded(_scalar("alpha", alpha, 0.0, 1.0))


def build_problem(
    student: Logits,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    *,
    divergence: DivergenceLike = "forward_kl",
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float | Tensor = 0.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    teacher_weights: Tensor | Sequence[float] | None = None,
    ensemble: Literal["prob", "logit"] = "prob",
    teacher_grad: bool = False,
    vocab: Literal["strict", "truncate"] = "strict",
    tail: Literal["bucket", "renorm", "zero"] = "bucket",
    overwrite_logits: bool = False,
    memory_budget: int | None = None,
    return_terms: bool = False,
    return_metrics: bool = False,
    of_shard: bool = False,
) -> Problem:
    """Check the arguments of ``distill_loss`` and normalise them; the errors raised here are its errors.

    ``of_shard``: other ranks have more columns, and this one may have one.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, size, name or value that cannot be meant, with what was expected and the remedy.
    """
    return_terms = return_terms or return_metrics
    _check_logits("student", student, of_shard=of_shard)
    student = with_tensors(student, recordable)
    teachers, sparse = _split_teacher(teacher, of_shard=of_shard)
    if not teachers and sparse is None and labels is None:
        msg = "distill_loss needs a teacher, labels or both, got neither"
        raise ValueError(msg)
    _choice("reduction", reduction, ("mean", "sum", "none"))
    _choice("ensemble", ensemble, ("prob", "logit"))
    _choice("vocab", vocab, ("strict", "truncate"))
    _choice("tail", tail, ("bucket", "renorm", "zero"))
    leading, device = student.shape[:-1], device_of(student)
    everyone = {"teacher" if len(teachers) == 1 else f"teacher[{k}]": t for k, t in enumerate(teachers)}
    for name, t in [*everyone.items(), *([("teacher", sparse)] if sparse is not None else [])]:
        if t.shape[:-1] != leading:
            msg = f"{name} must have the student's leading axes {tuple(leading)}, got {tuple(t.shape[:-1])}"
            raise ValueError(msg)
        if device_of(t) != device:
            msg = f"{name} is on {device_of(t)}, the student on {device}: move it with .to(student.device)"
            raise ValueError(msg)
    sizes = {name: t.shape[-1] for name, t in everyone.items()}
    columns = _columns(student, sizes if sparse is None else {"teacher": sparse.vocab_size}, vocab, of_shard=of_shard)
    temperature = recorded(_scalar("temperature", temperature, open_low=True))
    z_loss = recorded(_scalar("z_loss", z_loss))
    if isinstance(label_smoothing, Tensor):
        msg = "label_smoothing must be a float, got a tensor"
        raise TypeError(msg)
    label_smoothing = float(_scalar("label_smoothing", label_smoothing, 0.0, 1.0))
    if num_items is not None:
        num_items = recorded(_scalar("num_items", num_items, open_low=True))
        if reduction != "mean":
            msg = f'num_items replaces the denominator of reduction="mean", got reduction={reduction!r}'
            raise ValueError(msg)
    if memory_budget is not None:
        if not isinstance(memory_budget, (int, numbers.Integral)) or memory_budget <= 0:
            msg = f"memory_budget must be a positive number of bytes or None, got {memory_budget!r}"
            raise ValueError(msg)
        memory_budget = int(memory_budget)
    if overwrite_logits and isinstance(student, LMHead):
        msg = "overwrite_logits: an LMHead has no stored logits to overwrite: leave it False"
        raise ValueError(msg)
    if overwrite_logits and isinstance(student, Tensor):
        _check_writable(student)
    if teacher_grad and sparse is not None:
        msg = "teacher_grad: sparse targets carry no gradient: pass the teacher's logits"
        raise ValueError(msg)
    if weights is not None:
        _check_per_token("weights", weights, student)
        if not weights.is_floating_point():
            weights = weights.to(torch.float32)
        _check_values_of_tokens("weights", weights, math.inf, may_be_nan=True)
        weights = recordable(weights)
    a = _alpha(alpha, labelled=labels is not None, taught=bool(everyone or sparse), student=student)
    counted = None if weights is None else weights != 0
    probabilities: Tensor | None = None
    if labels is not None and _are_probabilities(labels, student):
        probabilities, labels = _probabilities(labels, student, counted, overwrite_logits=overwrite_logits), None
    if labels is not None:
        _check_per_token("labels", labels, student)
        if labels.dtype != torch.int64:
            msg = f"labels must be int64, got {labels.dtype}: pass labels.long()"
            raise TypeError(msg)
        labels = recordable(labels)
        kept = labels != ignore_index
        counted = kept if counted is None else counted & kept
        if isinstance(a, Tensor) and a.dim() > 0:
            labels = torch.where(a == 1, NO_LABEL, labels)
    answers = labels
    if return_metrics and probabilities is not None:
        answers = first_largest(probabilities)
        if isinstance(a, Tensor) and a.dim() > 0:
            answers = torch.where(a == 1, NO_LABEL, answers)
    w = _teacher_weights(teacher_weights, len(teachers), counted, student)
    labelled, taught = labels is not None or probabilities is not None, bool(teachers) or sparse is not None
    if not isinstance(a, Tensor) and not return_terms and labelled and taught:
        # A term whose weight is the number 0 is not there, unless somebody asks for its value or a gradient of zeros.
        learns = isinstance(temperature, Tensor) and temperature.requires_grad
        if a == 0 and not (teacher_grad or learns):
            teachers, sparse, w, columns = (), None, None, student.shape[-1]
        elif a == 1:
            labels = probabilities = None
    tau = temperature if isinstance(temperature, Tensor) else torch.tensor(temperature, dtype=torch.float64)
    return Problem(
        student=student,
        teachers=tuple(with_tensors(t if teacher_grad else _detached(t), recordable) for t in teachers),
        sparse=sparse if isinstance(sparse, SparseTargets) else None,
        packed=sparse if isinstance(sparse, PackedTargets) else None,
        teacher_weights=w,
        labels=labels,
        probabilities=probabilities,
        answers=answers if return_metrics else None,
        terms=divergence_terms(divergence),
        temperature=tau,
        fixed_temperature=None if isinstance(temperature, Tensor) else float(temperature),
        alpha=a,
        counted=counted,
        weights=weights,
        z_loss=z_loss,
        num_items=num_items,
        scale_t2=scale_t2,
        label_smoothing=label_smoothing,
        reduction=reduction,
        ensemble=ensemble,
        teacher_grad=teacher_grad,
        columns=columns,
        tail=tail,
        overwrite_logits=overwrite_logits,
        memory_budget=memory_budget,
        return_terms=return_terms,
        return_metrics=return_metrics,
    )


def _detached(t: Logits) -> Logits:
    return t.detach() if isinstance(t, Tensor) else t.map(Tensor.detach)
