"""Stored targets beside the samples of a data set."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kdfast.cache.error import CacheError
from kdfast.cache.keys import key_text
from kdfast.cache.reader import Reader
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets


class Samples(Protocol):
    """A map-style data set of mappings."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Dataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style data set whose samples carry the teacher's targets, found by key.

    Since access is by key, any order, subset, sampler or packing of the samples fits. With token ids in the samples
    each read checks that they are those the teacher saw: a data set that was tokenised anew, filtered or cut
    differently raises, and names the sample.

    Args:
        reader: of the cache.
        samples: a map-style data set of mappings.
        key: field that holds a sample's key; None: its index.
        token_ids: field that holds its token ids, checked where it is there; None: not checked.
        packed: give :class:`kdfast.PackedTargets`, for a loss on a GPU; every sample must be of the fixed tier.

    Items are the sample's fields and ``targets``, :class:`kdfast.SparseTargets` (S, K), or packed.

    Raises:
        CacheError: on access, a sample that is not stored, is damaged, or has other token ids.
        KeyError: a sample without the field ``key``.
    """

    def __init__(
        self,
        reader: Reader,
        samples: Samples,
        key: str | None = "id",
        *,
        token_ids: str | None = "input_ids",
        packed: bool = False,
    ) -> None:
        self.reader = reader
        self.samples = samples
        self.key = key
        self.token_ids = token_ids
        self.packed = packed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several at once, read in the order of the disk; DataLoader asks for its batches so."""
        samples = [self.samples[index] for index in indices]
        keys = [self._key(sample, index) for sample, index in zip(samples, indices, strict=True)]
        ids = [sample.get(self.token_ids) if self.token_ids is not None else None for sample in samples]
        targets: Sequence[Any] = self.reader.packed(keys, ids) if self.packed else self.reader.read(keys, ids)
        return [{**sample, "targets": one} for sample, one in zip(samples, targets, strict=True)]

    def _key(self, sample: Mapping[str, Any], index: int) -> str:
        if self.key is None:
            return key_text(index if index >= 0 else len(self) + index)
        if self.key not in sample:
            msg = f"sample {index} has no field {self.key!r}: pass key= the field of its key, or None for its index"
            raise KeyError(msg)
        return key_text(sample[self.key])


def collate(batch: Sequence[Mapping[str, Any]], *, pad: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A batch of samples of different lengths: what has one row a token is padded at the end and stacked.

    Args:
        batch: items of a :class:`Dataset`.
        pad: by field what to fill with; 0 where it is not said, -100 for ``labels``.

    Returns:
        ``targets``: (B, S, K), packed where those of the samples are; ids -1 and k_eff 0 in padded tokens, whose
        distillation term means nothing: give them label -100 or weight 0. ``token_mask`` (B, S) bool: the tokens that
        are there. Tensors and lists of numbers of S rows: (B, S, ...); other tensors of equal shape stacked; what is
        left as lists.

    Raises:
        CacheError: targets that do not stack, as of another method or K.
    """
    lengths = [sample["targets"].shape[0] for sample in batch]
    longest = max(lengths)
    fill = {"labels": -100.0, **(pad or {})}
    out: dict[str, Any] = {}
    for field in batch[0]:
        values = [sample[field] for sample in batch]
        if field == "targets":
            try:
                if isinstance(values[0], PackedTargets):
                    out[field] = PackedTargets.stack([v.padded(longest) for v in values])
                else:
                    out[field] = SparseTargets.stack([_padded_targets(v, longest) for v in values])
            except (ValueError, RuntimeError) as error:
                what = f"targets of a batch do not stack: {error}"
                raise CacheError(what, "mismatch") from error
            continue
        rows = [_rows(v) for v in values]
        tensors = [r for r in rows if r is not None]
        if len(tensors) < len(rows):
            out[field] = values
        elif all(t.dim() > 0 and len(t) == n for t, n in zip(tensors, lengths, strict=True)):
            out[field] = torch.stack([_padded(t, longest, fill.get(field, 0.0)) for t in tensors])
        elif len({t.shape for t in tensors}) == 1:
            out[field] = torch.stack(tensors)
        else:
            out[field] = values
    out["token_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return out


def collate_flat(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of documents end to end in one row of N tokens, without padding, for a causal language model.

    The student has to keep the documents apart, as transformers' models do by ``position_ids`` (flash attention, and
    SDPA or eager in versions that make their masks from them). A document's last row of targets is about a token that
    is not there, and the first token of the next is none that it predicts: its label is -100, and with it that row
    counts for nothing, once labels are shifted as such a model does.

    Args:
        batch: items of a :class:`Dataset`, with ``input_ids`` (S,) and at least one token each.

    Returns:
        ``targets``: (1, N, K), packed where those of the samples are. ``labels`` (1, N): the samples', or their
        ``input_ids``; -100 for the first token of each document. ``position_ids`` (1, N): the samples', or 0, 1, ...
        in each document. ``cu_seq_lens_q``, ``cu_seq_lens_k`` (B + 1,) int32, ``max_length_q``, ``max_length_k``: where
        documents begin and how long the longest is, as flash attention takes them. Other tensors and lists of numbers
        of S rows: (1, N, ...), but ``attention_mask``, which is left out; what is left as lists.

    Raises:
        CacheError: targets that do not go together, as of another method.
        ValueError: samples without ``input_ids``, with other fields than the first, or with other lengths of
            ``input_ids``, ``labels`` or ``position_ids`` than of their targets.
    """
    if not batch or any(sample.keys() != batch[0].keys() for sample in batch):
        msg = "collate_flat: needs at least one sample, and the same fields of all of them"
        raise ValueError(msg)
    lengths = [sample["targets"].shape[0] for sample in batch]
    fields = {name: [_rows(sample[name]) for sample in batch] for name in batch[0] if name != "targets"}
    if "input_ids" not in fields or min(lengths) < 1:
        msg = "collate_flat: every sample must have input_ids, and at least one token"
        raise ValueError(msg)
    out: dict[str, Any] = {}
    for name, rows in fields.items():
        per_token = all(x is not None and x.dim() > 0 and len(x) == n for x, n in zip(rows, lengths, strict=True))
        if name in ("input_ids", "labels", "position_ids"):
            if not per_token or any(x is None or x.dim() != 1 or x.is_floating_point() for x in rows):
                msg = f"collate_flat: {name} must be (S,) whole numbers beside targets of S tokens"
                raise ValueError(msg)
            rows = [x.long() for x in rows if x is not None]  # noqa: PLW2901  # -100 is none of a byte
        if not per_token:
            out[name] = [sample[name] for sample in batch]
        elif name != "attention_mask":
            out[name] = torch.cat([x for x in rows if x is not None])[None]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    if "position_ids" not in out:
        out["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    out["labels"] = out.get("labels", out["input_ids"]).clone()
    out["labels"][0, starts[:-1].long()] = -100
    kind: Any = type(batch[0]["targets"])
    try:
        if any(type(sample["targets"]) is not kind for sample in batch):
            msg = "some are packed"
            raise ValueError(msg)
        joined = kind.cat([sample["targets"] for sample in batch])
    except (ValueError, RuntimeError) as error:
        what = f"targets of a batch do not go together: {error}"
        raise CacheError(what, "mismatch") from error
    out["targets"] = kind.stack([joined])
    return (
        out
        | dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
        | dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
    )


def _rows(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float)) or (
        isinstance(value, (list, tuple)) and value and all(isinstance(x, (bool, int, float)) for x in value)
    ):
        return torch.tensor(value)
    return torch.as_tensor(value) if type(value).__module__ == "numpy" and hasattr(value, "dtype") else None


def _padded(value: Tensor, length: int, fill: float) -> Tensor:
    out = value.new_full((length, *value.shape[1:]), fill)
    out[: len(value)] = value
    return out


def _padded_targets(targets: SparseTargets, length: int) -> SparseTargets:
    def padded(value: Tensor | None, fill: float) -> Tensor | None:
        return None if value is None else _padded(value, length, fill)

    n = len(targets.ids)
    k_eff = targets.k_eff
    if k_eff is None:
        k_eff = torch.full((n,), targets.ids.shape[-1], dtype=torch.int32)
    return SparseTargets(
        _padded(targets.ids, length, -1),
        padded(targets.logprobs, float("-inf")),
        vocab_size=targets.vocab_size,
        lse=None if targets.lse is None else {t: _padded(v, length, 0.0) for t, v in targets.lse.items()},
        k_eff=_padded(k_eff, length, 0),
        method=targets.method,
        mass=padded(targets.mass, 0.0),
        neg_entropy=padded(targets.neg_entropy, 0.0),
        gold_logprob=padded(targets.gold_logprob, 0.0),
    )
