"""MiniLM: relations between tokens, as a transformer's self-attention sees them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.methods.feature.attention import (
    check_heads,
    projections,
    query_key_scores,
    scores,
    split_heads,
    visible,
)
from kdfast.methods.feature.pairs import Pair, Patterns, check_batch, mask_of
from kdfast.methods.feature.tensors import mean
from kdfast.methods.layers import expand
from kdfast.methods.loss import Loss, Value
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step

HIDDEN = -1e30  # score of a key that is not seen: no probability, and finite in every difference


class Relations(Loss):
    """Base of MiniLM's losses: the KL divergence of relations between tokens, of one layer of each model.

    Args:
        student: three patterns, of the query, key and value projections; or one that makes them one after another.
        teacher: likewise.
        heads: into which each of them is split.
        causal: only tokens at or before the query are seen.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.
        argument: the name of ``heads`` in the subclass, for messages.
    """

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        heads: int,
        causal: bool,
        weight: Setting,
        name: str | None,
        argument: str,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.student_layers = expand(student, "student")
        self.teacher_layers = expand(teacher, "teacher")
        for who, layers in (("student", self.student_layers), ("teacher", self.teacher_layers)):
            if len(layers) not in (1, 3):
                msg = (
                    f"{who} must name the query, key and value projections of one layer, as "
                    f'"encoder.layer.11.attention.self.{{query,key,value}}", or one that makes all three, got {layers}'
                )
                raise ValueError(msg)
        self._split = check_heads(heads, argument)
        self.causal = causal

    def _one(self, step: Step) -> list[Pair]:
        """Queries, keys and values of the layer."""
        sides = []
        for who, outputs, patterns in (
            ("student", step.student, self.student_layers),
            ("teacher", step.teacher, self.teacher_layers),
        ):
            found = projections(outputs, patterns, 3, who)
            if len(found) != 1:
                msg = f"{who} {patterns[0]!r} is {len(found)} layers, one is compared: name the last, as layer.11"
                raise ValueError(msg)
            sides.append(found[0])
        pairs = [Pair(s, t) for s, t in zip(*sides, strict=True)]
        for pair in pairs:
            check_batch(pair)
        return pairs

    def _own(self, pair: Pair, step: Step) -> Tensor:
        """KL of the relations of a projection with itself."""
        sides = zip(pair, ("student", "teacher"), strict=True)
        mask = mask_of(step, pair.student)
        s, t = (split_heads(layer, self._split, who, mask) for layer, who in sides)
        return self._divergence(scores(s, s), scores(t, t), mask, step.documents)

    def _divergence(self, student: Tensor, teacher: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
        """KL(softmax(teacher), softmax(student)), averaged over heads and queries that count."""
        mask = None if mask is None else mask.to(student.device)
        seen = visible(mask, documents, student.shape[2], self.causal, student.device)
        if seen is not None:
            student, teacher = student.masked_fill(~seen, HIDDEN), teacher.masked_fill(~seen, HIDDEN)
        s, t = F.log_softmax(student, dim=3), F.log_softmax(teacher, dim=3)
        each = F.kl_div(s, t, reduction="none", log_target=True).sum(dim=3)
        return mean(each, None if mask is None else mask[:, None, :])


class MiniLM(Relations):
    """MiniLM: KL(A_T, A_S) + KL(V_T, V_S) of one layer's attention distributions and value relations.

    A = softmax(Q K' / sqrt(d)) and V = softmax(V V' / sqrt(d)) for each head, d the head's size in its model, rows over
    the tokens that count. Each KL is in nats, averaged over heads and the batch's queries that count (the paper
    averages within an example first); the two are summed and logged as ``attention`` and ``value``. Models have as many
    heads as each other, of any size. A is made from the projections: no dropout is in it, models may use any attention
    kernel, and rotary or relative positions are left out. Plain PyTorch; 0 at equality.

    When to use:
        Task-agnostic distillation of encoders: only the last layer is taught, so that depth and width are free.
        As many heads are needed as the teacher has; :class:`MiniLMv2` drops that condition too.

    Cost:
        Scores (B, heads, S, S) in fp32 twice for each model, of one layer.

    Args:
        student: the last layer's query, key and value projections, three patterns, as
            "encoder.layer.5.attention.self.{query,key,value}"; or one of a projection (B, S, 3 H) that makes them one
            after another, as GPT-2's "transformer.h.5.attn.c_attn".
        teacher: likewise.
        heads: attention heads of both models.
        causal: only tokens at or before the query are seen, as in a decoder.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: not three patterns; several layers; a width that ``heads`` does not divide; other batches or
            sequences.

    Source:
        Wang et al., "MiniLM: deep self-attention distillation for task-agnostic compression of pre-trained
        transformers", arXiv 2002.10957.

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
        >>> loss = MiniLM("layer.1.{q,k,v}", "layer.3.{q,k,v}", heads=2)
        >>> with Distiller(Encoder(2, 8), Encoder(4, 16), [loss]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['loss', 'minilm', 'minilm.attention', 'minilm.value']
    """

    default_name: ClassVar[str] = "minilm"

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        heads: int,
        causal: bool = False,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, heads=heads, causal=causal, weight=weight, name=name, argument="heads")

    def forward(self, step: Step) -> Value:
        query, key, value = self._one(step)
        with torch.autocast(query.student.tensor.device.type, enabled=False):
            mask = mask_of(step, query.student)
            attention = Pair(
                query_key_scores(query.student, key.student, self._split, "student", mask),
                query_key_scores(query.teacher, key.teacher, self._split, "teacher", mask),
            )
            parts = {
                "attention": self._divergence(attention.student.tensor, attention.teacher.tensor, mask, step.documents),
                "value": self._own(value, step),
            }
        return parts["attention"] + parts["value"], parts


class MiniLMv2(Relations):
    """MiniLMv2: the sum over X = Q, K, V of KL(R_T, R_S), R = softmax(X X' / sqrt(d)) for each of A_r relation heads.

    Heads of a model are concatenated and split into A_r of size d = H / A_r, so that neither number nor size of heads
    has to agree. Rows are over the tokens that count; each KL is in nats, averaged over relation heads and tokens that
    count; the three are summed and logged as ``query``, ``key`` and ``value``. Memory is O(B A_r S^2) for each. Plain
    PyTorch; 0 at equality.

    When to use:
        Task-agnostic distillation of encoders of any depth, width and number of heads: the first choice for
        making a small BERT from a large one. With a large teacher take an upper middle layer.

    Cost:
        Scores (B, relation heads, S, S) in fp32 three times for each model, of one layer.

    Args:
        student: the last layer's query, key and value projections, see :class:`MiniLM`.
        teacher: likewise, of the last layer, or one in the upper middle of a large teacher (21 of 24).
        relation_heads: A_r, which divides every projection's width.
        causal: only tokens at or before are seen.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: not three patterns; several layers; a width that ``relation_heads`` does not divide; other batches
            or sequences.

    Source:
        Wang et al., "MiniLMv2: multi-head self-attention relation distillation for compressing pretrained
        transformers", arXiv 2012.15828 (A_r is 48 there for a base teacher, 64 for a large one).

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
        >>> loss = MiniLMv2("layer.1.{q,k,v}", "layer.3.{q,k,v}", relation_heads=4)
        >>> with Distiller(Encoder(2, 8), Encoder(4, 16), [loss]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['loss', 'minilm_v2', 'minilm_v2.key', 'minilm_v2.query', 'minilm_v2.value']
    """

    default_name: ClassVar[str] = "minilm_v2"

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        relation_heads: int = 48,
        causal: bool = False,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            student,
            teacher,
            heads=relation_heads,
            causal=causal,
            weight=weight,
            name=name,
            argument="relation_heads",
        )

    def forward(self, step: Step) -> Value:
        found = self._one(step)
        with torch.autocast(found[0].student.tensor.device.type, enabled=False):
            names = ("query", "key", "value")
            parts = {name: self._own(pair, step) for name, pair in zip(names, found, strict=True)}
        return torch.stack(list(parts.values())).sum(), parts
