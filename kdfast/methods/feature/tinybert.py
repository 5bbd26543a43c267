"""TinyBERT's transformer distillation: embeddings, hidden states and attention scores of layers that a map pairs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdfast.methods.feature.attention_maps import AttentionMaps
from kdfast.methods.feature.pairs import LayerMap, Pair, Patterns, check_map, layers_of, mask_of, pair_layers
from kdfast.methods.feature.projectors import channels, pointwise
from kdfast.methods.feature.tensors import check_same, mean, tokens, without_padding
from kdfast.methods.layers import expand
from kdfast.methods.loss import Loss, Value
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step


class TinyBERT(Loss):
    """TinyBERT's transformer distillation: MSE(E_S W_e, E_T) + sum_m [MSE(H_m W_h, H_g(m)) + MSE(A_m, A_g(m))].

    E are the embeddings' outputs, H the layers', A the attention scores before the softmax as :class:`AttentionMaps`
    has them. W_e and W_h, one for all layers, are learned without bias, made by ``prepare`` and the Distiller's. The
    MSE of hidden states is averaged over features and the tokens that count, that of attention over heads and pairs of
    such tokens; layers are summed. Terms ``embeddings``, ``hidden`` and ``attention`` are logged. The prediction loss
    is :class:`kdfast.methods.KD`, in a later stage of training. Plain PyTorch; 0 where the projected layers and the
    attention equal the teacher's.

    When to use:
        A shallower, narrower encoder from a BERT-like teacher, on much unlabelled text, in a stage of its own
        before KD on the task. Not beside the labels of a small task: there it has hurt in our comparison.

    Cost:
        Hidden states and queries and keys of all paired layers stay in memory; attention scores are (B, heads,
        S, S) in fp32 for each layer.

    Args:
        student: patterns of the embeddings' and the layers' outputs (B, S, H), in this order: ":hidden_states.*", or
            "{embeddings,encoder.layer.*}".
        teacher: likewise.
        student_attention: as ``student`` of :class:`AttentionMaps`, or None to leave attention out.
        teacher_attention: likewise.
        heads: of both models; not needed for maps.
        layer_map: g, of layers without the embeddings: "uniform", g(m) = m N / M; "last", g(m) = m + N - M; a list of
            the teacher's layers, from 0, one for each layer of the student, or of (student, teacher) pairs.
        causal: only keys at or before the query count.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: attention of one model alone; layers that cannot be paired; other heads, batches or sequences.

    Source:
        Jiao et al., "TinyBERT: distilling BERT for natural language understanding", arXiv 1909.10351, equations 7 to 9.

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
        >>> loss = TinyBERT(student_attention="layer.*.{q,k}", teacher_attention="layer.*.{q,k}", heads=2)
        >>> with Distiller(Encoder(2, 8), Encoder(4, 16), [loss]) as d:
        ...     d.prepare(batch)
        ...     loss, terms = d(batch)
        >>> sorted(terms)
        ['loss', 'tinybert', 'tinybert.attention', 'tinybert.embeddings', 'tinybert.hidden']
    """

    default_name: ClassVar[str] = "tinybert"
    needs_shapes: ClassVar[bool] = True

    def __init__(
        self,
        student: Patterns = ":hidden_states.*",
        teacher: Patterns = ":hidden_states.*",
        *,
        student_attention: Patterns | None,
        teacher_attention: Patterns | None,
        heads: int | None = None,
        layer_map: LayerMap = "uniform",
        causal: bool = False,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self._hidden = (expand(student, "student"), expand(teacher, "teacher"))
        self.student_layers, self.teacher_layers = self._hidden
        self.layer_map = check_map(layer_map)
        self.attention: AttentionMaps | None = None
        if (student_attention is None) != (teacher_attention is None):
            msg = "student_attention and teacher_attention go together: name both, or None for both"
            raise ValueError(msg)
        if student_attention is not None and teacher_attention is not None:
            self.attention = AttentionMaps(
                student_attention, teacher_attention, heads=heads, layer_map=layer_map, causal=causal
            )
            self.student_layers += self.attention.student_layers
            self.teacher_layers += self.attention.teacher_layers
        self.embeddings: nn.Module | None = None  # W_e
        self.hidden: nn.Module | None = None  # W_h

    def _pairs(self, step: Step) -> list[Pair]:
        """The embeddings, then the layers."""
        student, teacher = layers_of(step.student, self._hidden[0]), layers_of(step.teacher, self._hidden[1])
        if len(student) < 2 or len(teacher) < 2:
            msg = (
                f"TinyBERT needs the embeddings' output and that of at least one layer, got {len(student)} student and "
                f'{len(teacher)} teacher layers: name ":hidden_states.*" or "{{embeddings,encoder.layer.*}}"'
            )
            raise ValueError(msg)
        embeddings = pair_layers(student[:1], teacher[:1], "uniform")
        return embeddings + pair_layers(student[1:], teacher[1:], self.layer_map)

    def prepare(self, step: Step) -> None:
        embeddings, *layers = self._pairs(step)
        self.embeddings = pointwise(*channels(embeddings), embeddings, bias=False)
        self.hidden = pointwise(*channels(layers[0]), layers[0], bias=False)
        self.prepared = True

    def forward(self, step: Step) -> Value:
        embeddings, *layers = self._pairs(step)
        with torch.autocast(embeddings.student.tensor.device.type, enabled=False):
            parts = {
                "embeddings": _distance(self.embeddings, embeddings, step),
                "hidden": torch.stack([_distance(self.hidden, pair, step) for pair in layers]).sum(),
            }
        if self.attention is not None:
            found = self.attention(step)
            parts["attention"] = found[0] if isinstance(found, tuple) else found
        return torch.stack(list(parts.values())).sum(), parts


def _distance(projector: Any, pair: Pair, step: Step) -> Tensor:
    counted = tokens(mask_of(step, pair.student), pair.student)
    student, teacher = (without_padding(layer.tensor, counted) for layer in pair)
    found = pair.with_tensors(projector(student), teacher)
    check_same(found, "the teacher's layer is not as wide as the one that prepare saw")
    squares = (found.student.tensor - teacher).square()
    return mean(squares, None if counted is None else counted.unsqueeze(-1))
