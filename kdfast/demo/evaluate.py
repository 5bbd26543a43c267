"""What is measured on held-out text: perplexity, agreement with the teacher, calibration, speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.demo.model import GPT
from kdfast.loss import distill_loss
from kdfast.reporting.calibration import expected_calibration_error, reliability


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model over the held-out sequences."""

    nats: float  # cross-entropy per token
    perplexity: float  # exp(nats)
    accuracy: float  # share of tokens whose top-1 prediction is the text
    agreement: float  # share of tokens whose top-1 prediction is the teacher's
    fitted_temperature: float  # divides the logits; minimises the nats of the calibration sequences
    nats_fitted: float  # on the other sequences, with that temperature
    nats_unfitted: float  # on the same sequences without it
    ece: float  # expected calibration error of the top-1 confidence, on the other sequences
    ece_fitted: float
    reliability: list[dict[str, float]]  # per bin: confidence, accuracy, share of the tokens
    reliability_fitted: list[dict[str, float]]


def evaluate(
    model: GPT, ids: Tensor, teacher_top1: Tensor | None, calibration: int, check: Callable[[], None], *, batch: int = 8
) -> tuple[Evaluation, Tensor]:
    """Measures a model on held-out text.

    Args:
        model: teacher or student.
        ids: (N, S + 1) int64 held-out sequences.
        teacher_top1: (N, S) int64 predictions of the teacher; None: the model is the teacher.
        calibration: number of sequences that fit the temperature; calibration is measured on the others.
        check: called after each batch; may raise to stop.
        batch: sequences at a time.

    Returns:
        The figures, and the model's own top-1 predictions (N, S) int64.
    """
    # Evenly spread, so that both parts hold text of every file.
    fit_rows = torch.zeros(len(ids), dtype=torch.bool)
    fit_rows[torch.arange(calibration) * len(ids) // calibration] = True
    temperature = _fit_temperature(model, ids[fit_rows], check, batch)
    nats, nats_fitted, confidence, confidence_fitted, top1 = [], [], [], [], []
    for part in torch.split(ids, batch):
        logits = _logits(model, part[:, :-1])
        labels = part[:, 1:]
        best, index = logits.max(dim=-1)
        gold = logits.gather(-1, labels[..., None])[..., 0]
        lse, lse_fitted = logits.logsumexp(-1), (logits / temperature).logsumexp(-1)
        nats.append(lse - gold)
        nats_fitted.append(lse_fitted - gold / temperature)
        confidence.append((best - lse).exp())
        confidence_fitted.append((best / temperature - lse_fitted).exp())
        top1.append(index)
        check()
    predicted = torch.cat(top1)
    correct = (predicted == ids[:, 1:]).double()
    all_nats = torch.cat(nats).double()
    scored = ~fit_rows
    bins = reliability(torch.cat(confidence)[scored], correct[scored])
    bins_fitted = reliability(torch.cat(confidence_fitted)[scored], correct[scored])
    mean = all_nats.mean().item()
    result = Evaluation(
        nats=mean,
        perplexity=math.exp(mean),
        accuracy=correct.mean().item(),
        agreement=1.0 if teacher_top1 is None else (predicted == teacher_top1).double().mean().item(),
        fitted_temperature=temperature,
        nats_fitted=torch.cat(nats_fitted)[scored].double().mean().item(),
        nats_unfitted=all_nats[scored].mean().item(),
        ece=expected_calibration_error(bins),
        ece_fitted=expected_calibration_error(bins_fitted),
        reliability=bins,
        reliability_fitted=bins_fitted,
    )
    return result, predicted


def inference_speed(model: GPT, ids: Tensor, repeats: int = 7) -> dict[str, Any]:
    """Returns tokens/s of a forward pass over (B, S) ids, in the faster of fp32 and bf16 autocast, and which it was."""
    speeds = {}
    for name, enabled in (("fp32", False), ("bf16", True)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            seconds = [_seconds(lambda: model(ids)) for _ in range(repeats + 1)][1:]  # the first one warms up
        speeds[name] = ids.numel() / statistics.median(seconds)
    best = max(speeds, key=lambda name: speeds[name])
    return {"tokens_per_second": speeds[best], "dtype": best, "batch": list(ids.shape)}


def compare_loss_time(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, *, repeats: int = 9
) -> dict[str, float]:
    """Times forward KL with its gradient, kdfast and the usual PyTorch lines by turns.

    Args:
        student: (B, S, V) fp32 logits.
        teacher: (B, S, V) bf16 logits.
        labels: (B, S) int64.
        temperature: of both.
        alpha: weight of the distillation term.
        repeats: of each; the medians count.

    Returns:
        Median milliseconds of each, and their ratio.
    """

    def ours() -> None:
        leaf = student.detach().requires_grad_()
        loss: Any = distill_loss(leaf, teacher, labels, temperature=temperature, alpha=alpha)
        torch.autograd.backward(loss)

    def eager() -> None:
        leaf = student.detach().requires_grad_()
        s, t = leaf.flatten(0, 1), teacher.flatten(0, 1)
        log_p = F.log_softmax(s.float() / temperature, -1)
        log_q = F.log_softmax(t.float() / temperature, -1)
        soft = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        hard = F.cross_entropy(s.float(), labels.flatten())
        loss = alpha * temperature**2 * soft + (1 - alpha) * hard
        torch.autograd.backward(loss)

    pairs = [(_seconds(ours), _seconds(eager)) for _ in range(repeats + 1)][1:]
    kdfast_ms, eager_ms = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return {"kdfast_ms": kdfast_ms, "eager_ms": eager_ms, "ratio": eager_ms / kdfast_ms}


def _logits(model: GPT, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(inputs)
    return logits


def _fit_temperature(model: GPT, ids: Tensor, check: Callable[[], None], batch: int) -> float:
    """Minimises the cross-entropy over b = 1 / temperature, in which it is convex, by Newton's method.

    With z the logits and p = softmax(b z): slope E_p[z] - z_y, curvature Var_p[z].
    """
    logits = []
    for part in torch.split(ids, batch):
        logits.append(_logits(model, part[:, :-1]))
        check()
    labels = torch.split(ids[:, 1:], batch)
    inverse = 1.0
    for _ in range(8):
        slope = curvature = 0.0
        for z, y in zip(logits, labels, strict=True):
            p = (inverse * z).softmax(-1)
            mean = (p * z).sum(-1)
            slope += (mean - z.gather(-1, y[..., None])[..., 0]).sum().item()
            curvature += ((p * z * z).sum(-1) - mean * mean).sum().item()
        change = max(-0.5 * inverse, min(inverse, -slope / max(curvature, 1e-9)))
        inverse += change
        check()
        if abs(change) < 1e-5:
            break
    return 1.0 / inverse


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
