"""A batch's outputs, labels and weights brought to the same positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdfast.methods.batch import Inputs
from kdfast.methods.positions import documents, is_span, masked, predicting, tokens_of_logits, within_text
from kdfast.methods.step import IGNORED, Outputs, Step
from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets


def aligned(
    student: Outputs,
    teachers: tuple[Outputs, ...],
    inputs: Inputs,
    *,
    causal: bool,
    two_sided: bool,
    unlabelled: int | None,
    number: int,
) -> Step:
    """What the losses see of a batch: logits, labels and weights of the same positions, those that count told apart.

    Args:
        student: its outputs, as the model made them.
        teachers: likewise.
        inputs: the batch.
        causal: logits at position i are compared with the label at i + 1.
        two_sided: of an encoder-decoder model.
        unlabelled: the label of tokens that have none.
        number: the optimizer step.
    """
    labels, weights = inputs.labels, inputs.weights
    student, *others = (_within_text(one, inputs) for one in (student, *teachers))
    teachers, logits = tuple(others), student.logits
    places = None if logits is None else logits.shape[:-1]
    tokens = tokens_of_logits(inputs, two_sided=two_sided)
    document = None if two_sided else documents(inputs.positions)
    if tokens is not None and inputs.token_mask is not None:
        _check_token_mask(tokens, places)
    counts = None
    if places is not None:
        counts = predicting(places, tokens, document, causal=causal, device=_device(logits))
    teachers = tuple(_of_one_token(teacher, places) for teacher in teachers)
    if causal:
        student = _shifted(student)
        teachers = tuple(_shifted(teacher) for teacher in teachers)
        counts = None if counts is None else counts[..., :-1]
        whole = logits is not None and labels is not None and labels.dim() == len(logits.shape)  # class probabilities
        labels = None if labels is None else labels[..., 1:, :] if whole else labels[..., 1:]
        weights = None if weights is None else _check_weights(weights, places)[..., 1:]
    unmarked = None
    if labels is not None and not labels.is_floating_point():
        if logits is not None and is_span(student.raw):  # an answer may be cut off with the end of its text
            labels = labels.masked_fill(labels >= logits.shape[-1], IGNORED)
        labels = masked(labels, counts)
        if unlabelled is not None:
            unmarked = labels == unlabelled
            labels = labels.masked_fill(unmarked, IGNORED)
    elif counts is not None:
        given = None if weights is None else _check_weights(weights, counts.shape)
        weights = counts.float() if given is None else torch.where(counts, given, 0.0)
    if two_sided and tokens is None and inputs.labels is not None and not inputs.labels.is_floating_point():
        tokens = inputs.labels != IGNORED
    return Step(
        student,
        teachers,
        labels,
        weights,
        mask=inputs.mask if two_sided or (tokens is not None and tokens.dim() != 2) else tokens,
        index=inputs.index,
        number=number,
        target_mask=tokens if two_sided else None,
        documents=document,
        counts=counts,
        unlabelled=unmarked,
        encoder_decoder=two_sided,
    )


def items(step: Step, labelled_only: bool, device: torch.device) -> Tensor:
    """Counted tokens or examples: the sum of the weights of those that are not dropped; no synchronisation."""
    labels, counted = step.labels, None
    if labels is not None and not labels.is_floating_point():
        counted = labels != IGNORED
        if step.unlabelled is not None and not labelled_only:
            counted = counted | step.unlabelled
    if counted is not None:
        return (counted if step.weights is None else counted * step.weights).sum()
    if step.weights is not None:
        return step.weights.sum()
    logits = step.student.logits
    if logits is None:
        msg = "num_items needs labels, weights or logits to count the tokens of this batch by"
        raise ValueError(msg)
    return torch.tensor(float(logits.shape[:-1].numel()), device=device)


def _check_token_mask(mask: Tensor, places: torch.Size | None) -> None:
    """A mask that is given for the logits must have their axes; of classifiers' cached samples, (B, 1), it has more."""
    if places is not None and len(places) == mask.dim() == 2 and mask.shape != places:
        msg = f"token_mask must have the logits' leading axes {tuple(places)}, got {tuple(mask.shape)}"
        raise ValueError(msg)


def _check_weights(weights: Tensor, places: torch.Size | None) -> Tensor:
    if places is not None and weights.shape != places:
        msg = f"weights must have the student's leading axes {tuple(places)}, got {tuple(weights.shape)}"
        raise ValueError(msg)
    return weights


def _device(logits: Any) -> torch.device:
    device: torch.device = (logits.hidden if isinstance(logits, LMHead) else logits).device
    return device


def _within_text(outputs: Outputs, inputs: Inputs) -> Outputs:
    return replace(outputs, logits=within_text(outputs.logits, outputs.raw, inputs.mask))


def _shifted(outputs: Outputs) -> Outputs:
    """Without the last position, which predicts a token that is not there."""
    logits = outputs.logits
    if isinstance(logits, LMHead):
        logits = logits.map_tokens(lambda x: x[..., :-1, :])
    elif isinstance(logits, Tensor):
        logits = logits[..., :-1, :]
    elif logits is not None:
        every = (slice(None),) * (len(logits.shape) - 2)
        logits = logits[every + (slice(-1),)]  # noqa: RUF005
    return Outputs(logits, outputs.raw, outputs.captured)


def _of_one_token(outputs: Outputs, shape: torch.Size | None) -> Outputs:
    """Stored targets (B, 1, K) of a classifier, whose samples are one token long, as (B, K)."""
    targets: Any = outputs.logits
    stored = isinstance(targets, (SparseTargets, PackedTargets))
    if stored and shape is not None and len(shape) == 1 and targets.shape[:2] == (*shape, 1):
        return Outputs(targets[:, 0], outputs.raw, outputs.captured)
    return outputs
