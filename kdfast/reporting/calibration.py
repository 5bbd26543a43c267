"""How far a model's confidence is from how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15  # equally wide, of the top-1 confidence


def reliability(confidence: Tensor, correct: Tensor) -> list[dict[str, float]]:
    """The points of a reliability diagram.

    Args:
        confidence: probability of the top-1 prediction, any shape.
        correct: 1 where it is right, else 0; same shape.

    Returns:
        For each of ``BINS`` equally wide bins that is not empty: mean confidence, accuracy, share of the predictions.
    """
    index = (confidence * BINS).long().clamp(max=BINS - 1).flatten()
    counts = torch.bincount(index, minlength=BINS).double()
    confidences = torch.bincount(index, weights=confidence.double().flatten(), minlength=BINS)
    corrects = torch.bincount(index, weights=correct.double().flatten(), minlength=BINS)
    return [
        {
            "confidence": (confidences[i] / counts[i]).item(),
            "accuracy": (corrects[i] / counts[i]).item(),
            "share": (counts[i] / counts.sum()).item(),
        }
        for i in range(BINS)
        if counts[i] > 0
    ]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """Sum over the bins of share * abs(confidence - accuracy).

    Source:
        Guo et al., "On calibration of modern neural networks", arXiv 1706.04599.
    """
    return sum(row["share"] * abs(row["confidence"] - row["accuracy"]) for row in bins)
