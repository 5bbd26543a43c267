"""Attention maps, or their scores before the softmax, head by head."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdfast.methods.feature.attention import check_heads, projections, query_key_scores, visible
from kdfast.methods.feature.pairs import (
    Layer,
    LayerMap,
    Pair,
    Patterns,
    check_map,
    layers_of,
    mask_of,
    pair_layers,
)
from kdfast.methods.feature.tensors import check_mask, check_same, mean
from kdfast.methods.layers import expand
from kdfast.methods.loss import Loss, Value
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Outputs, Step


class AttentionMaps(Loss):
    """Sum over pairs of layers of the MSE of attention, averaged over heads and pairs of tokens that count.

    Two patterns for each model, of the query and key projections, give TinyBERT's scores before the softmax, Q K' /
    sqrt(d): no dropout is in them, models may use any attention kernel, and nothing has to be configured; one pattern
    of a projection (B, S, 3 H) that makes queries, keys and values one after another (GPT-2's c_attn) likewise. Rotary
    or relative positions are not in them. One pattern of maps (B, A, S, S), ":attentions.*", compares what the models
    return; that of a student of transformers in train mode carries its attention dropout. Padded queries and keys are
    left out, and keys after the query where ``causal``. Plain PyTorch; 0 at equality.

    When to use:
        Where two transformers have as many heads and attention is all that should be taught, or together with
        FitNet on hidden states. :class:`MiniLM` asks less of the student: one layer, and no layer map to
        choose.

    Cost:
        Scores (B, heads, S, S) in fp32 of each paired layer of both models.

    Args:
        student: ":attentions.*", or two patterns, as "encoder.layer.*.attention.self.{query,key}".
        teacher: likewise, with as many heads.
        heads: into which queries and keys are split; not needed for maps.
        layer_map: see :class:`FitNet`.
        causal: only keys at or before the query count.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: heads missing or not dividing the width; layers that cannot be paired; other heads, batches or
            sequences.

    Source:
        Jiao et al., "TinyBERT: distilling BERT for natural language understanding", arXiv 1909.10351, equation 7 (its
        code counts padded keys as equal, and so divides by more).

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> class Encoder(nn.Module):
        ...     def __init__(self, depth, w):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(50, w)
        ...         self.layer = nn.ModuleList(nn.ModuleDict({n: nn.Linear(w, w) for n in "qkv"}) for _ in range(depth))
        ...     def forward(self, input_ids):
        ...         states = [self.embed(input_ids)]
        ...         for at in self.layer:
        ...             q, k, v = (at[n](states[-1]) for n in "qkv")
        ...             states.append(states[-1] + nn.functional.scaled_dot_product_attention(q, k, v))
        ...         return {"hidden_states": tuple(states)}
        >>> batch = {"input_ids": torch.randint(0, 50, (4, 7))}
        >>> loss = AttentionMaps("layer.*.{q,k}", "layer.*.{q,k}", heads=2)
        >>> with Distiller(Encoder(2, 8), Encoder(4, 16), [loss]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['attention_maps', 'attention_maps.0', 'attention_maps.1', 'loss']
    """

    default_name: ClassVar[str] = "attention_maps"

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        heads: int | None = None,
        layer_map: LayerMap = "uniform",
        causal: bool = False,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.student_layers = expand(student, "student")
        self.teacher_layers = expand(teacher, "teacher")
        for who, layers in (("student", self.student_layers), ("teacher", self.teacher_layers)):
            if len(layers) > 2:
                msg = f"{who} must be one pattern of maps, or two, of queries and of keys, got {len(layers)}: {layers}"
                raise ValueError(msg)
            if len(layers) == 2 and heads is None:
                msg = "heads is needed to split queries and keys into: give the model's num_attention_heads"
                raise ValueError(msg)
        self.heads = None if heads is None else check_heads(heads, "heads")
        self.layer_map = check_map(layer_map)
        self.causal = causal

    def forward(self, step: Step) -> Value:
        students, teachers = step.student, step.teacher
        with torch.autocast(students.layers(self.student_layers[0])[0].device.type, enabled=False):
            pairs = pair_layers(
                self._maps(students, self.student_layers, "student", step),
                self._maps(teachers, self.teacher_layers, "teacher", step),
                self.layer_map,
                several=all("*" in side[0] for side in (self.student_layers, self.teacher_layers)),
            )
            found = [self._compare(pair, step) for pair in pairs]
        total = torch.stack(found).sum()
        return total if len(found) == 1 else (total, {str(k): part for k, part in enumerate(found)})

    def _maps(self, outputs: Outputs, patterns: tuple[str, ...], who: str, step: Step) -> list[Layer]:
        if len(patterns) == 1 and outputs.layers(patterns[0])[0].dim() == 4:
            return layers_of(outputs, patterns)
        if self.heads is None:
            msg = f"heads is needed to split {who} {patterns[0]!r} into: give the model's num_attention_heads"
            raise ValueError(msg)
        found = projections(outputs, patterns, 2, who)
        return [query_key_scores(query, key, self.heads, who, mask_of(step, query)) for query, key in found]

    def _compare(self, pair: Pair, step: Step) -> Tensor:
        check_same(pair, "attention maps (B, heads, S, S) must agree, head by head")
        s = pair.student.tensor
        if s.dim() != 4 or s.shape[2] != s.shape[3]:
            msg = f"{pair.shapes()}: attention maps (B, heads, S, S) are needed"
            raise ValueError(msg)
        mask = mask_of(step, pair.student)
        if mask is not None:
            check_mask(mask, pair.student, s.shape[2])
            mask = mask.to(s.device)
        counted = visible(mask, step.documents, s.shape[2], self.causal, s.device)
        if mask is not None and counted is not None:
            counted = counted & mask[:, None, :, None]
        gap = s - pair.teacher.tensor
        if counted is not None:
            gap = gap.masked_fill(~counted, 0.0)  # before the square, whose gradient at NaN is NaN
        return mean(gap.square(), counted)
