"""The methods under comparison, each with its published weight or the one that is stated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kdfast.methods import KD, CrossEntropy, Loss, WarmUp
from kdfast.methods.feature import FSP, NST, VID, AttentionMaps, AttentionTransfer, FitNet, MiniLM, MiniLMv2, TinyBERT
from kdfast.methods.relation import CC, CRD, PKT, RKD, SP
from kdfast.methods.response import (
    DIST,
    DKD,
    NKD,
    TTM,
    WTTM,
    AdaptiveKL,
    LearnedTemperature,
    LogitStandardisation,
)

LABELS = "labels alone"


@dataclass(frozen=True)
class Layers:
    """Path patterns of what a task's student and teacher have in common; None where they have no such layer."""

    labels: Tensor  # (N,) of the training set
    embedding: str | None = "hidden"  # one vector per example
    maps: str | None = None  # feature maps, in pairs
    last_map: str | None = None
    attention: bool = False  # both are transformers of examples.suite.transformer


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: in the table.
        setting: weights and temperatures, for the reader.
        losses: of the task's layers and the number of optimizer steps.
        needs: field of :class:`Layers` without which the method has nothing to compare.
    """

    name: str
    setting: str
    losses: Callable[[Layers, int], Sequence[Loss]]
    needs: str | None = None


def _labelled(*losses: Loss) -> list[Loss]:
    return [CrossEntropy(), *losses]


def _of(layers: Layers, field: str) -> tuple[str, str]:
    pattern = getattr(layers, field)
    return pattern, pattern


QUERY_KEY = "blocks.*.{query,key}"
LAST = "blocks.{}.{{query,key,value}}"

METHODS = (
    Method(LABELS, "CE", lambda layers, steps: [CrossEntropy()]),
    Method(
        "label smoothing", "CE, smoothing 0.1; no teacher", lambda layers, steps: [CrossEntropy(label_smoothing=0.1)]
    ),
    Method("KD", "tau 4, alpha 0.9", lambda layers, steps: [KD(temperature=4.0, alpha=0.9)]),
    Method("KD, reverse KL", "tau 4, alpha 0.9", lambda layers, steps: [KD(alpha=0.9, divergence="reverse_kl")]),
    Method("KD, JSD", "tau 4, alpha 0.9, beta 0.5", lambda layers, steps: [KD(alpha=0.9, divergence="jsd")]),
    Method(
        "curriculum temperature (CTKD)",
        "KD alpha 0.9, learned tau, reversed gradient",
        lambda layers, steps: [KD(temperature=LearnedTemperature(), alpha=0.9)],
    ),
    Method(
        "DKD",
        "CE 1 + alpha 1, beta 8, tau 4, warm-up over 1/12 of the steps",
        lambda layers, steps: _labelled(DKD(weight=WarmUp(1.0, steps=max(1, steps // 12)))),
    ),
    Method("NKD", "CE 1 + gamma 1.5, tau 1", lambda layers, steps: _labelled(NKD())),
    Method(
        "DIST", "CE 1 + beta 2, gamma 2, tau 4", lambda layers, steps: _labelled(DIST(beta=2, gamma=2, temperature=4.0))
    ),
    Method(
        "logit standardisation",
        "CE 0.1 + 9, tau 2",
        lambda layers, steps: [CrossEntropy(weight=0.1), LogitStandardisation()],
    ),
    Method("TTM", "CE 1 + 1, gamma 0.1", lambda layers, steps: _labelled(TTM())),
    Method("WTTM", "CE 1 + 1, gamma 0.1", lambda layers, steps: _labelled(WTTM())),
    Method("adaptive KL", "CE 1 + 1, tau 1", lambda layers, steps: _labelled(AdaptiveKL())),
    Method("FitNet", "CE 1 + 100", lambda layers, steps: _labelled(FitNet(*_of(layers, "embedding"))), "embedding"),
    Method("VID", "CE 1 + 1", lambda layers, steps: _labelled(VID(*_of(layers, "embedding"))), "embedding"),
    Method("FitNet, maps", "CE 1 + 100", lambda layers, steps: _labelled(FitNet(*_of(layers, "last_map"))), "last_map"),
    Method("VID, maps", "CE 1 + 1", lambda layers, steps: _labelled(VID(*_of(layers, "last_map"))), "last_map"),
    Method(
        "attention transfer",
        "CE 1 + 1000",
        lambda layers, steps: _labelled(AttentionTransfer(*_of(layers, "maps"))),
        "maps",
    ),
    Method("NST", "CE 1 + 50", lambda layers, steps: _labelled(NST(*_of(layers, "last_map"))), "last_map"),
    Method("FSP", "CE 1 + 1", lambda layers, steps: _labelled(FSP(*_of(layers, "maps"))), "maps"),
    Method(
        "RKD",
        "CE 1 + 1 (distance 25, angle 50)",
        lambda layers, steps: _labelled(RKD(*_of(layers, "embedding"), distance=25.0, angle=50.0)),
        "embedding",
    ),
    Method("SP", "CE 1 + 3000", lambda layers, steps: _labelled(SP(*_of(layers, "embedding"))), "embedding"),
    Method(
        "CC, kernel",
        "CE 1 + 100 (the published 0.02 is another form's)",
        lambda layers, steps: _labelled(CC(*_of(layers, "embedding"), weight=100.0)),
        "embedding",
    ),
    Method("PKT", "CE 1 + 30000", lambda layers, steps: _labelled(PKT(*_of(layers, "embedding"))), "embedding"),
    Method(
        "CRD",
        "CE 1 + 0.8, as many negatives as examples, of other classes",
        lambda layers, steps: _labelled(
            CRD(
                *_of(layers, "embedding"),
                samples=len(layers.labels),
                negatives=len(layers.labels),
                labels=layers.labels,
            )
        ),
        "embedding",
    ),
    Method(
        "KD + RKD",
        "KD as above + RKD as above",
        lambda layers, steps: [KD(), RKD(*_of(layers, "embedding"), distance=25.0, angle=50.0)],
        "embedding",
    ),
    Method(
        "KD + attention transfer",
        "KD as above + 1000",
        lambda layers, steps: [KD(), AttentionTransfer(*_of(layers, "maps"))],
        "maps",
    ),
    Method(
        "attention scores",
        "CE 1 + 1",
        lambda layers, steps: _labelled(AttentionMaps(QUERY_KEY, QUERY_KEY, heads=4)),
        "attention",
    ),
    Method(
        "TinyBERT",
        "CE 1 + 1",
        lambda layers, steps: _labelled(TinyBERT(student_attention=QUERY_KEY, teacher_attention=QUERY_KEY, heads=4)),
        "attention",
    ),
    Method(
        "MiniLM",
        "CE 1 + 1, last layer",
        lambda layers, steps: _labelled(MiniLM(LAST.format(1), LAST.format(3), heads=4)),
        "attention",
    ),
    Method(
        "MiniLMv2",
        "CE 1 + 1, last layer, 8 relation heads",
        lambda layers, steps: _labelled(MiniLMv2(LAST.format(1), LAST.format(3), relation_heads=8)),
        "attention",
    ),
)


def fitting(layers: Layers) -> list[Method]:
    """The methods that a task's models have the layers for."""
    return [method for method in METHODS if method.needs is None or getattr(layers, method.needs)]
