"""Texts of unlike lengths, small models that read them, and the gradient of an objective."""

from __future__ import annotations

import torch
import transformers
from torch import nn

V, H = 37, 16
LENGTHS = (9, 5, 7)
QKV = "model.layers.1.self_attn.{q,k,v}_proj"


def llama(layers=2, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        attn_implementation="eager",
        output_hidden_states=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def padded(rows, *, left=False, more=0, fill=0):
    """(B, S) of documents of different lengths."""
    longest = max(map(len, rows)) + more
    out = torch.full((len(rows), longest), fill, dtype=rows[0].dtype)
    for one, row in zip(out, rows, strict=True):
        place = slice(longest - len(row), None) if left else slice(len(row))
        one[place] = row
    return out


def texts():
    return [torch.randint(1, V, (n,)) for n in LENGTHS]


class Poison(nn.Module):
    """NaN at padding, where it is told what that is."""

    padding = None

    def forward(self, x):
        return x if self.padding is None else x.masked_fill(self.padding[..., None], torch.nan)


class Tokens(nn.Module):
    """A causal model that sees a token alone, so that packing needs no attention mask."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(V, H)
        self.query, self.key, self.value = (nn.Sequential(nn.Linear(H, H), Poison()) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(H, V), Poison())

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in (self.query, self.key, self.value):
            layer(x)
        return {"logits": self.head(sum(layer[0](x) for layer in (self.query, self.key, self.value)))}


def gradients_of(d, student, batch, **options):
    student.zero_grad()
    loss, terms = d(batch, **options)
    loss.backward()
    return loss.detach(), terms, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
