"""How the examples on which models disagree are shown."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdfast.reporting.measure import Disagreement

NUMBERS = 12  # shown of a row
TOKENS = 48  # shown of the ids before a position
LARGEST = 160  # pixels of an image's side
CHARACTERS = 400  # of a text

#: Of an example's input to what is shown: a text, or a tensor that is drawn. Rows of ids come as a list.
Describe: TypeAlias = Callable[[Any], "str | Tensor"]
#: Names of the columns of the logits.
Classes: TypeAlias = "Sequence[str] | Mapping[int, str] | Callable[[int], str]"


def shown(entry: Disagreement, describe: Describe | None, classes: Classes | None, sequences: bool) -> dict[str, Any]:
    """One example as JSON has it: ``text`` or ``image`` (a PNG in a data URI), and every model's predictions.

    Args:
        entry: the example.
        describe: see :func:`kdfast.report`.
        classes: see :func:`kdfast.report`.
        sequences: whether the columns are tokens, which ``describe`` has a text for too.
    """
    name = _namer(describe, classes, sequences)
    content = None if entry.x is None else _content(entry.x, describe)
    return {
        "number": entry.number,
        "key": entry.key if isinstance(entry.key, (int, str)) else None if entry.key is None else str(entry.key),
        "position": entry.position if sequences else None,
        "kl": entry.kl if entry.kl < float("inf") else None,
        "entropy": entry.entropy,
        "label": None if entry.label is None else name(entry.label),
        "predictions": {
            model: [{"class": name(column), "probability": p} for column, p in best]
            for model, best in entry.predictions.items()
        },
        **({"text": "the input holds no tensor"} if content is None else content),
    }


def _content(x: Tensor, describe: Describe | None) -> dict[str, str]:
    ids = x.dim() == 1 and not x.is_floating_point()
    if describe is not None:
        found = describe(x.tolist() if ids else x)
        if isinstance(found, Tensor):
            return {"image": png(found)}
        if not isinstance(found, str):
            msg = f"describe must return a text or a tensor to draw, got {type(found).__name__}"
            raise TypeError(msg)
        return {"text": _last(found) if ids else found[:CHARACTERS]}
    if x.dim() in (2, 3) and min(x.shape[-2:]) > 1:
        return {"image": png(x)}
    values = x.flatten()
    if ids:
        text = " ".join(str(v) for v in values[-TOKENS:].tolist())
        return {"text": f"… {text}" if len(values) > TOKENS else text}
    text = ", ".join(f"{v:.3g}" for v in values[:NUMBERS].tolist())
    return {"text": f"{text}, … ({len(values)} numbers)" if len(values) > NUMBERS else text}


def _last(text: str) -> str:
    """The end of a text, which is what the models predicted from."""
    return f"…{text[-CHARACTERS:]}" if len(text) > CHARACTERS else text


def _namer(describe: Describe | None, classes: Classes | None, sequences: bool) -> Callable[[int], str]:
    if callable(classes):
        return lambda column: str(classes(column))
    if isinstance(classes, Mapping):
        return lambda column: str(classes.get(column, column))
    if classes is not None:
        return lambda column: str(classes[column]) if column < len(classes) else str(column)
    if describe is not None and sequences:
        return lambda column: repr(found) if isinstance(found := describe([column]), str) else str(column)
    return str


def png(image: Tensor) -> str:
    """An image in a data URI, its least value black and its greatest white.

    Args:
        image: (C, H, W) or (H, W); three channels are red, green and blue, others are averaged.
    """
    x = image.detach().cpu().float()
    x = x[None] if x.dim() == 2 else x
    x = x if len(x) == 3 else x.mean(0, keepdim=True)
    largest = max(x.shape[-2:])
    if largest > LARGEST:
        h, w = (max(1, round(side * LARGEST / largest)) for side in x.shape[-2:])
        x = torch.nn.functional.interpolate(x[None], size=(h, w), mode="area")[0]
    x = x.nan_to_num()
    least, greatest = x.min(), x.max()
    pixels = ((x - least) / (greatest - least).clamp(min=1e-12) * 255).round().byte().permute(1, 2, 0).contiguous()
    h, w, channels = pixels.shape
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)  # 0: the row is not filtered
    header = struct.pack(">IIBBBBB", w, h, 8, 2 if channels == 3 else 0, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
