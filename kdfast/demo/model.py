"""A small GPT: pre-norm transformer with rotary positions and tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model; `context` is the longest sequence in tokens."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    context: int

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            msg = f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}"
            raise ValueError(msg)


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a layer norm and a residual connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps (B, S, width) to the same shape; cos and sin are (S, width / heads)."""
        b, s, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, s, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, head width)
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(b, s, width))
        z: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))
        return x + z


class GPT(nn.Module):
    """A decoder-only language model; the output projection is the embedding's transpose."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        cos, sin = _rotary_tables(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        self.apply(_init)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                # so that the variance of the residual stream does not grow with the number of layers
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, ids: Tensor) -> Tensor:
        """Maps (B, S) int64 token ids to (B, S, V) logits; position i predicts token i + 1."""
        s = ids.shape[1]
        x = self.embedding(ids)
        cos, sin = self.cos[:s], self.sin[:s]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = F.linear(self.norm(x), self.embedding.weight)
        return logits

    def parameter_count(self) -> int:
        """Returns the number of parameters, the tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())


def _rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    rate = 10000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), rate).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
