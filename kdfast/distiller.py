"""One objective around any training loop: ``Distiller``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache.reader import Reader
from kdfast.methods.aligned import aligned, items
from kdfast.methods.batch import Inputs, Split, split_batch
from kdfast.methods.gate import gated_outputs, nothing_of
from kdfast.methods.given import Teacher, check_options, checked_head, losses_of, teacher_heads_of, teachers_of
from kdfast.methods.layers import Capture, parse, unwrapped
from kdfast.methods.loss import Loss, LossLike
from kdfast.methods.modes import Quiet
from kdfast.methods.positions import (
    arguments,
    count_items,
    encoder_decoder,
    placed,
    refuse_cut_sequences,
    warn_of_copies,
)
from kdfast.methods.projection import Projection
from kdfast.methods.router import router_loss
from kdfast.methods.schedule import value
from kdfast.methods.step import Outputs, Step, logits_of
from kdfast.methods.stored import stored
from kdfast.methods.synchronise import GradientAverage, data_parallel_groups, reshard
from kdfast.spec import reduction
from kdfast.spec.head import LMHead
from kdfast.spec.problem import _scalar


class Distiller:
    """A student, its teachers and the losses between them, around a loop that stays the caller's own.

    A context manager. Inside it the teachers are in eval mode whenever they run, whatever an outer ``train()`` did in
    between, and forward hooks keep the layers that the losses ask for; on leaving, hooks are gone and modes are as
    before. No module is replaced, and no ``state_dict`` changes.
    Teachers run without gradient, but for one that is a student as well, that is a part of one, or whose inputs require
    it. What the losses learn themselves (projectors, temperatures, memories) is apart from both models: in
    :meth:`parameters` and :meth:`state_dict`.

    ::

        with Distiller(student, teacher, [KD(temperature=4.0, alpha=0.9)]) as d:
            for batch in loader:
                loss, terms = d(batch)
                loss.backward()

    The objective is sum_k weight_k(step) * loss_k, times counted / num_items where ``num_items`` is given, and the
    load-balancing loss of a mixture of experts' router, ``router``, where the student returns one. Losses that
    compare the samples of a batch with each other (relations) depend on what is in it, whatever the scaling.

    Args:
        student: called as ``student(*args, **kwargs)`` with the inputs of a batch. It may be compiled (enter before its
            first call) or wrapped (DistributedDataParallel, FSDP, ``fully_shard``, DeepSpeed): the gradients of the
            losses' own parameters are then averaged over the ranks as well.
        teacher: a module, a :class:`kdfast.cache.Reader`, a sequence of them, or None.
        losses: each a :class:`kdfast.methods.Loss`, a callable of a :class:`kdfast.methods.Step`, or a pair of such a
            callable and its weight.
        split: how a batch is split into inputs and labels; :func:`kdfast.methods.split_batch` by default.
        causal: logits at position i are compared with the label at i + 1: logits lose their last position, labels their
            first. kdfast never shifts of itself, and warns where labels are ``input_ids`` themselves. Which positions
            count is said in :mod:`kdfast.methods.positions`.
        unlabelled: a label, as -1, of tokens that have none: they keep their soft terms, with an alpha of 1, where -100
            drops a token from every term.
        head: the student's output projection: its logits are never made, and the losses are computed there, inside its
            forward pass, as wrappers want it. :func:`kdfast.integrations.huggingface.head_of` finds it in a model of
            transformers.
        teacher_head: likewise of the teacher; of several, one or None for each.
        accumulation_steps: calls that make one optimizer step, for schedules.
        process_group: over which the losses' own parameters are kept equal, or several, one an axis of a mesh. None:
            that of the wrapper around the student, see :func:`kdfast.methods.synchronise.data_parallel_groups`; to be
            given for a wrapper that cannot be seen from the student, as DeepSpeed's engine around a larger module.

    Attributes:
        number: optimizer steps so far, which schedules are functions of; may be set.
        losses: the losses, in the order of the terms.

    Raises:
        TypeError: a teacher or loss of another kind, or one loss in the place of a list.
        ValueError: no loss, a teacher that is the student, ``causal`` of an encoder-decoder model, whose logits are
            aligned with its labels; on entering, a layer pattern that matches nothing.

    Source:
        Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531, and the papers of the losses.

    Example:
        >>> from kdfast.methods import KD
        >>> student, teacher, x = nn.Linear(3, 5), nn.Linear(3, 5), torch.randn(7, 3)
        >>> with Distiller(student, teacher, [KD(temperature=4.0)]) as d:
        ...     loss, terms = d((x, torch.zeros(7, dtype=torch.int64)))
        ...     loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Sequence[Teacher] | None,
        losses: Sequence[LossLike],
        *,
        split: Split = split_batch,
        causal: bool = False,
        unlabelled: int | None = None,
        head: Projection | None = None,
        teacher_head: Projection | Sequence[Projection | None] | None = None,
        accumulation_steps: int = 1,
        process_group: Any = None,
    ) -> None:
        check_options(student, causal=causal, unlabelled=unlabelled, accumulation_steps=accumulation_steps)
        self.student = student
        self.teachers = teachers_of(student, teacher)
        self.head = checked_head("head", head)
        self.teacher_heads = teacher_heads_of(teacher_head, self.teachers)
        self.split = split
        self.causal = causal
        self.unlabelled = unlabelled
        self.accumulation_steps = accumulation_steps
        self._groups: list[Any] = [] if process_group is None else _several(process_group)
        self.number = 0
        self._calls = 0  # since the last optimizer step
        self._looked = False  # at a batch, for labels that want a shift
        self._extra = losses_of(losses)
        self._captures: list[Capture] | None = None  # the student's, then each teacher's
        self._quiet: list[Quiet] = []
        self._average: GradientAverage | None = None

    @property
    def losses(self) -> Mapping[str, Loss]:
        """The losses by the names of their terms."""
        return dict(self._extra.items())  # type: ignore[arg-type]

    # --- Entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> Distiller:
        if self._captures is not None:
            msg = "this Distiller is entered already"
            raise RuntimeError(msg)
        if self.causal:
            refuse_cut_sequences()
        losses = self.losses.values()
        captures: list[Capture] = []
        try:
            for head, names in (
                (self.head, "student_layers"),
                *((one, "teacher_layers") for one in self.teacher_heads),
            ):
                whole = [
                    p for loss in losses for p in getattr(loss, names) if head is not None and not parse(p).modules
                ]
                if whole:
                    msg = (
                        f"{whole[0]!r} is a part of what the model returns, which a head comes before: name the layers "
                        'themselves, as "model.layers.*", or give neither head nor teacher_head'
                    )
                    raise ValueError(msg)
            patterns = [p for loss in losses for p in loss.student_layers]
            captures.append(Capture(self.student, patterns, "student", detach=False))
            patterns = [p for loss in losses for p in loss.teacher_layers]
            for teacher in self.teachers:
                if isinstance(teacher, nn.Module):
                    captures.append(Capture(teacher, patterns, "teacher", detach=True))
                elif patterns:
                    msg = f"a cached teacher has no layers, and {patterns[0]!r} is asked for: give the model itself"
                    raise ValueError(msg)
        except BaseException:
            for capture in captures:
                capture.remove()
            raise
        self._captures = captures
        self._quiet = [Quiet(teacher, self.student) for teacher in self.teachers if isinstance(teacher, nn.Module)]
        device = next((p.device for p in self.student.parameters()), None)
        if device is not None:
            self._extra.to(device)
        self._synchronise()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for capture in self._captures or ():
            capture.remove()
        self._captures = None
        for quiet in reversed(self._quiet):  # of teachers that share modules the first one saw the modes of before
            quiet.remove()
        self._quiet.clear()
        if self._average is not None:
            self._average.remove()
            self._average = None

    # --- What the losses learn ----------------------------------------------------------------------------------------

    def prepare(self, batch: Any) -> None:
        """Runs the models once, in eval mode and without gradient, and makes the parameters that follow from shapes.

        Call it inside the context, before the optimizer is built. Nothing of the models changes, no step is counted.

        Args:
            batch: as for a call.
        """
        captures = self._entered()
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        try:
            with torch.no_grad():
                self._run(self.split(batch), self._made)
        finally:
            for module, training in modes:
                module.training = training
            for capture in captures:
                capture.clear()
            reshard(self.student)
        self._synchronise()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The losses' own parameters, for the optimizer beside the student's.

        Raises:
            RuntimeError: some follow from the shapes of a batch that has not been seen: call :meth:`prepare` first.
        """
        self._require_prepared()
        return self._extra.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The losses' parameters and buffers, and the step: to be saved beside the student's."""
        self._require_prepared()
        return {"losses": self._extra.state_dict(), "number": self.number, "calls": self._calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; after :meth:`prepare`, where the losses need it.

        Raises:
            RuntimeError: other losses or shapes, or parameters that are not made yet.
        """
        self._require_prepared()
        self._extra.load_state_dict(state["losses"])
        self.number, self._calls = state["number"], state["calls"]

    # --- The objective ------------------------------------------------------------------------------------------------

    def __call__(self, batch: Any, *, num_items: float | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs the student and the teachers on a batch, and returns the objective.

        Args:
            batch: see ``split``.
            num_items: replaces the number of counted tokens (or examples) as denominator: those of all micro-batches
                under gradient accumulation, the global number / world size under DistributedDataParallel.

        Returns:
            The objective, 0-d, and the terms by name, detached and before their weights; ``"loss"`` is the objective.

        Raises:
            RuntimeError: outside the context, or before :meth:`prepare` where a loss needs it.
            ValueError: a loss that returned a tensor with axes, or a ``num_items`` that is not above 0.
        """
        self._entered()
        self._require_prepared()  # before the models run, and change their statistics
        num_items = None if num_items is None else _scalar("num_items", num_items, open_low=True)
        inputs = self.split(batch)
        if not (self.causal or self._looked):
            self._looked = True
            warn_of_copies(inputs, stacklevel=2)
        found = self._run(inputs, lambda step: self._objective(step, num_items), num_items)
        self._count()
        return found

    def loss(
        self,
        student_out: Any,
        teacher_out: Any = None,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        index: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of outputs that the caller's own loop has made, inside the context.

        Args:
            student_out: what the student returned: logits, an object or mapping with ``logits``, or a tuple of which
                they are the first; an :class:`kdfast.LMHead`.
            teacher_out: of the teacher likewise, or targets; of several teachers, a sequence as long as they are many.
            labels: (...) int64.
            weights: (...) per token.
            mask: (B, S) bool, the tokens of the models' input that are not padding.
            token_mask: (...) bool, the positions of the logits that are to count, in the place of ``mask``.
            position_ids: (B, S) int64, which begin anew with each document of a packed row.
            index: (B,) int64, positions in the data set.
            num_items: as for a call.

        Returns:
            As a call does.
        """
        captures = iter(self._entered())
        several = len(self.teachers) > 1
        outs = list(teacher_out) if several else [] if teacher_out is None else [teacher_out]
        if several and len(outs) != len(self.teachers):
            msg = f"teacher_out must have one output for each of the {len(self.teachers)} teachers, got {len(outs)}"
            raise ValueError(msg)
        student = Outputs(logits_of(student_out), student_out, next(captures).take())
        taught = []
        for k, out in enumerate(outs):
            live = k < len(self.teachers) and isinstance(self.teachers[k], nn.Module)
            taught.append(Outputs(_detached(logits_of(out)), out, next(captures).take() if live else {}))
        inputs = Inputs(
            labels=labels, weights=weights, mask=mask, index=index, token_mask=token_mask, positions=position_ids
        )
        num_items = None if num_items is None else _scalar("num_items", num_items, open_low=True)
        found = self._objective(self._aligned(student, tuple(taught), inputs), num_items)
        self._count()
        return found

    def count_items(self, batch: Any) -> Tensor:
        """How much of a batch counts, before a model has seen it: ``num_items`` is the sum over a step's batches.

        Positions, or their weights, with a label that is not -100; without labels those that are tokens'; examples
        where there are no tokens. Which positions count is said in :mod:`kdfast.methods.positions`.

        Args:
            batch: as for a call.

        Returns:
            0-d, where the batch is.
        """
        inputs = self.split(batch)
        two_sided = encoder_decoder(self.student, inputs)
        return count_items(inputs, causal=self.causal, two_sided=two_sided, unlabelled=self.unlabelled)

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _entered(self) -> list[Capture]:
        if self._captures is None:
            msg = "a Distiller works inside its context: with Distiller(...) as d"
            raise RuntimeError(msg)
        return self._captures

    @property
    def entered(self) -> bool:
        """Whether this is inside the context."""
        return self._captures is not None

    @property
    def prepared(self) -> bool:
        """Whether the losses have all their parameters."""
        return all(loss.prepared for loss in self.losses.values())

    def _require_prepared(self) -> None:
        lazy = [name for name, loss in self.losses.items() if not loss.prepared]
        if lazy:
            msg = f"the parameters of {', '.join(lazy)} follow from a batch's shapes: call d.prepare(batch) first"
            raise RuntimeError(msg)

    def _synchronise(self) -> None:
        """Keeps the losses' parameters equal on all ranks, from the first moment at which a wrapper is to be seen."""
        parameters = [p for p in self._extra.parameters() if p.requires_grad]
        if not self._groups and (parameters or self.head is not None or not self.prepared):
            self._groups = data_parallel_groups(self.student)
        if self._average is None and parameters and self._groups and self.prepared:
            self._average = GradientAverage(self._groups, parameters)

    def _made(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        for loss in self.losses.values():
            if not loss.prepared:
                loss.prepare(step)
        return torch.zeros((), device=next(self.student.parameters()).device), {}

    def _run(
        self,
        inputs: Inputs,
        use: Callable[[Step], tuple[Tensor, dict[str, Tensor]]],
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs the models, and ``use`` on what they made of the batch: where there is a head, inside the student."""
        with contextlib.ExitStack() as stack:
            taught = self._teach(inputs, stack)
            kwargs = arguments(self.student, inputs, self.unlabelled)
            if self.head is not None:
                if not self.head.checked:
                    self.head.check(self.student, inputs.args, kwargs, self._agree)

                seen: list[Step] = []

                def at_head(logits: LMHead) -> tuple[Tensor, dict[str, Tensor]]:
                    student = Outputs(logits, None, self._entered()[0].take())
                    seen.append(self._aligned(student, taught, inputs))
                    return use(seen[0])

                def more(raw: Any) -> dict[str, tuple[Tensor, Tensor]]:
                    return self._router(seen[0], raw, num_items)

                return self.head.run(self.student, inputs.args, kwargs, at_head, more)
            try:
                raw = self.student(*inputs.args, **kwargs)
            except RuntimeError as error:
                if "find_unused_parameters" not in str(error):
                    raise
                msg = (
                    "no loss reaches some of the student's parameters, for which DistributedDataParallel waits: add a "
                    "loss of the logits, CrossEntropy(weight=0.0) if it shall not count, or wrap the student with "
                    "find_unused_parameters=True"
                )
                raise RuntimeError(msg) from error
            student = Outputs(logits_of(raw), raw, self._entered()[0].take())
            return use(self._aligned(student, taught, inputs))

    def _agree(self, found: bool, device: torch.device) -> bool:
        """Whether all ranks that share the student found so."""
        flag = torch.tensor(float(found), device=device)
        for group in self._groups:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group)
        return bool(flag)

    def _teach(self, inputs: Inputs, stack: contextlib.ExitStack) -> tuple[Outputs, ...]:
        """The teachers' outputs; where there is none but the batch has targets, those.

        Args:
            inputs: the batch.
            stack: keeps what has to be held until the outputs were used.
        """
        captures, quiet = iter(self._entered()[1:]), iter(self._quiet)
        two_sided = encoder_decoder(self.student, inputs)
        outputs = []
        for teacher, head in zip(self.teachers, self.teacher_heads, strict=True):
            if isinstance(teacher, Reader):
                outputs.append(Outputs(stored(teacher, inputs, two_sided=two_sided)))
                continue
            kwargs = arguments(teacher, inputs, self.unlabelled)
            with torch.no_grad(), next(quiet), _named_teacher(teacher):
                if head is None:
                    raw = teacher(*inputs.args, **kwargs)
                    logits = _detached(logits_of(raw))
                else:
                    if not head.checked:
                        head.check(teacher, inputs.args, kwargs, self._agree)
                    raw, hidden = None, head.hidden(teacher, inputs.args, kwargs)
                    logits = stack.enter_context(head.whole(hidden.detach()))
            outputs.append(Outputs(logits, raw, next(captures).take()))
        if not self.teachers and inputs.targets is not None:
            padding = inputs.decoder_mask if two_sided else inputs.mask
            outputs.append(Outputs(placed(inputs.targets, padding)))
        return tuple(outputs)

    def _aligned(self, student: Outputs, teachers: tuple[Outputs, ...], inputs: Inputs) -> Step:
        return aligned(
            student,
            teachers,
            inputs,
            causal=self.causal,
            two_sided=encoder_decoder(self.student, inputs),
            unlabelled=self.unlabelled,
            number=self.number,
        )

    def _objective(self, step: Step, num_items: float | Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        self._require_prepared()
        self._synchronise()
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            weight = value(loss.weight, step.number)
            silent = not isinstance(weight, Tensor) and weight == 0
            seen = replace(step, student=gated_outputs(step.student, weight))
            with torch.set_grad_enabled(torch.is_grad_enabled() and not silent):
                found = loss(seen)
            amount, parts = found if isinstance(found, tuple) else (found, {})
            if not isinstance(amount, Tensor) or amount.dim() != 0:
                got = f"shape {tuple(amount.shape)}" if isinstance(amount, Tensor) else type(amount).__name__
                msg = f"loss {name!r} must return one number, a 0-d tensor, got {got}: reduce it, as with .mean()"
                raise (ValueError if isinstance(amount, Tensor) else TypeError)(msg)
            terms[name] = amount.detach()
            terms |= {f"{name}.{part}": part_value.detach() for part, part_value in parts.items()}
            if silent:  # logged, and no part of the objective: its gradient may be infinite
                weighted = nothing_of(*_student_tensors(step.student), *loss.parameters())
            elif isinstance(weight, Tensor):
                weighted = reduction.weighted(weight.to(amount), amount, "none")
            else:
                weighted = amount * weight
            if num_items is not None:
                weighted = weighted * (items(step, loss.labelled_only, amount.device) / num_items)
            total = weighted if total is None else total + weighted
        assert total is not None  # there is at least one loss
        for name, (share, term) in self._router(step, step.student.raw, num_items).items():
            total = total + share
            terms[name] = term
        terms["loss"] = total.detach()
        return total, terms

    def _router(self, step: Step, raw: Any, num_items: float | Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """A mixture of experts' own loss: its share of the optimizer step's items, as of every other, and itself."""
        found = None if raw is None else router_loss(self.student, raw)
        if found is None:
            return {}
        share = found if num_items is None else found * (items(step, False, found.device) / num_items)
        return {"router": (share, found.detach())}

    def _count(self) -> None:
        if torch.is_grad_enabled():
            self._calls += 1
            if self._calls >= self.accumulation_steps:
                self.number, self._calls = self.number + 1, 0


Distiller.__module__ = "kdfast"  # where it is for users, and for what they pickle


@contextlib.contextmanager
def _named_teacher(teacher: nn.Module) -> Iterator[None]:
    """Says whose index was out of range: most often a token of the student's that the teacher has not got."""
    try:
        yield
    except IndexError as error:
        name = type(unwrapped(teacher)).__name__
        msg = f"{name}, the teacher: {error}; it must know every token that the student does"
        raise IndexError(msg) from error


def _several(groups: Any) -> list[Any]:
    return list(groups) if isinstance(groups, (list, tuple)) else [groups]


def _student_tensors(student: Outputs) -> list[Tensor]:
    """What a loss's gradient reaches the student by."""
    logits = student.logits
    tensors = logits.tensors() if isinstance(logits, LMHead) else [logits]
    return [
        x for x in [*tensors, *(x for layers in student.captured.values() for x in layers)] if isinstance(x, Tensor)
    ]


def _detached(logits: Any) -> Any:
    return logits.detach() if isinstance(logits, Tensor) else logits
