"""Logits that are described by what makes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Cap(NamedTuple):
    """How logits follow from the product of hidden states and weight."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none

    @property
    def plain(self) -> bool:
        """Whether logits are the product itself."""
        return self == Cap()

    def logits(self, product: Tensor) -> Tensor:
        """Those of a product, fp32, or fp64 for an fp64 one; a column of -inf stays one, and has no gradient."""
        if self.plain:
            return product
        x = product if product.dtype == torch.float64 else product.float()
        absent = x == -math.inf
        # Beside the product at most two tensors of its size exist at a time, and the mask.
        x = torch.where(absent, 0.0, x).mul_(self.scale)
        if self.softcap:
            x = x.div_(self.softcap).tanh_() * self.softcap
        return x.masked_fill_(absent, -math.inf)

    def slope(self, product: Tensor) -> Tensor:
        """The derivative of :meth:`logits`."""
        if self.plain:
            return torch.ones_like(product)
        t = torch.tanh(product * (self.scale / self.softcap)) if self.softcap else torch.zeros_like(product)
        return torch.where(product == -math.inf, 0.0, self.scale * (1 - t) * (1 + t))


@dataclass(frozen=True, eq=False)
class LMHead:
    """Logits that are described, not stored: ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    With ``low_rank`` (a, b) the product is ``hidden @ weight.T + a @ b.T``, as of a projection that LoRA adapts.

    The product and its bias are rounded to the dtype of ``hidden``; what follows is fp32, or fp64 for fp64. A column of
    -inf, such as a bias makes of one that only pads, stays one.

    Args:
        hidden: (..., H) floating point, the input of the output projection.
        weight: (V, H), same dtype as ``hidden``.
        bias: (V,) or None.
        softcap: bound of the logits, > 0 and finite (Gemma); None leaves them as they are.
        scale: factor of the logits, finite, applied before ``softcap`` (Granite, Cohere).
        low_rank: (..., R) and (V, R), same dtype as ``hidden``, whose product is added; None. Not over ranks that
            share the vocabulary.

    Raises:
        TypeError: ``hidden``, ``weight`` or ``bias`` that is no tensor, ``softcap`` or ``scale`` that is no number.
        ValueError: shapes that do not fit, or a number out of its range.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    low_rank: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        for name, value in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if not isinstance(value, Tensor) and not (name == "bias" and value is None):
                msg = f"LMHead: {name} must be a tensor, got {type(value).__name__}"
                raise TypeError(msg)
        for name, number in (("scale", self.scale), ("softcap", self.softcap)):
            if isinstance(number, Tensor):
                msg = f"LMHead: {name} must be a number, got a tensor: multiply hidden by a factor that is learned"
                raise TypeError(msg)
            if not isinstance(number, int | float) and not (name == "softcap" and number is None):
                msg = f"LMHead: {name} must be a number, got {type(number).__name__}"
                raise TypeError(msg)
        if not abs(self.scale) < math.inf:
            msg = f"LMHead: scale must be finite, got {self.scale!r}"
            raise ValueError(msg)
        if self.weight.dim() != 2 or self.hidden.dim() < 1 or self.hidden.shape[-1] != self.weight.shape[1]:
            msg = (
                f"LMHead: hidden must be (..., H) and weight (V, H), got {tuple(self.hidden.shape)} and "
                f"{tuple(self.weight.shape)}"
            )
            raise ValueError(msg)
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            msg = f"LMHead: bias must be ({self.weight.shape[0]},), got {tuple(self.bias.shape)}"
            raise ValueError(msg)
        if self.low_rank is not None:
            self._check_low_rank(self.low_rank)
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            msg = f"LMHead: softcap must be > 0 and finite, or None, got {self.softcap!r}"
            raise ValueError(msg)

    def _check_low_rank(self, given: object) -> None:
        if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)):
            msg = f"LMHead: low_rank must be two tensors or None, got {type(given).__name__}"
            raise TypeError(msg)
        a, b = given
        leading, columns = self.hidden.shape[:-1], self.weight.shape[0]
        if a.dim() < 1 or b.dim() != 2 or a.shape[:-1] != leading or b.shape != (columns, a.shape[-1]):
            msg = (
                f"LMHead: low_rank must be {(*leading, 'R')} and {(columns, 'R')}, got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
            raise ValueError(msg)

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits, (..., V)."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def cap(self) -> Cap:
        """Scale and softcap."""
        return Cap(float(self.scale), float(self.softcap or 0.0))

    def map(self, fn: Callable[[Tensor], Tensor]) -> LMHead:
        """The head with ``fn`` applied to each of its tensors."""
        bias = None if self.bias is None else fn(self.bias)
        low_rank = None if self.low_rank is None else (fn(self.low_rank[0]), fn(self.low_rank[1]))
        return replace(self, hidden=fn(self.hidden), weight=fn(self.weight), bias=bias, low_rank=low_rank)

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> LMHead:
        """The head with ``fn`` applied to each of its tensors that has a row for each token, (..., n)."""
        low_rank = None if self.low_rank is None else (fn(self.low_rank[0]), self.low_rank[1])
        return replace(self, hidden=fn(self.hidden), low_rank=low_rank)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Hidden states, weight, bias and the two of ``low_rank``."""
        return self.hidden, self.weight, self.bias, *(self.low_rank or (None, None))

    def _parts(self) -> dict[str, Tensor | None]:
        names = ("hidden", "weight", "bias", "low_rank[0]", "low_rank[1]")
        return {f"LMHead.{name}": x for name, x in zip(names, self.tensors(), strict=True)}

    def logits(self) -> Tensor:
        """The logits, (..., V): this makes the tensor that the head exists to avoid.

        In the dtype of ``hidden``; with a scale or a softcap in fp32, where that is 16 bits wide.
        """
        product = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        if self.low_rank is not None:
            product = product + torch.nn.functional.linear(*self.low_rank)
        return self.cap.logits(product)


LMHead.__module__ = "kdfast"  # where it is for users, and for what they pickle
