"""A small transformer that reads a digit as eight rows, for the methods that compare attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each behind a norm and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, width) to the same shape."""
        b, s, width = x.shape
        normed = self.norm_attention(x)
        q, k, v = (
            part(normed).view(b, s, HEADS, width // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, width)
        x = x + self.out(attended)
        mixed: Tensor = self.mlp(x)
        return x + mixed


class Transformer(nn.Module):
    """Reads (B, 64) as eight tokens of eight pixels; the mean of the last layer's tokens is classified."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.hidden = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Logits (B, 10), and the hidden states of all layers, the embeddings' first."""
        tokens = self.embedding(x.view(-1, 8, 8)) + self.positions
        states = [tokens]
        for block in self.blocks:
            states.append(block(states[-1]))
        return {"logits": self.head(self.hidden(states[-1].mean(1))), "hidden_states": tuple(states)}
