"""Sparse targets as a cache stores them, to be unpacked where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdfast.spec.sparse import SAMPLED, SparseTargets

#: Offsets count in units of so many bytes, which is what a GPU loads at once.
WORD = 4

# What unpacks them, (ids (..., K) int32, -1 from k_eff on; logprobs (..., K) fp32, -inf there): who does it on which
# device stands in kdfast.ops.unpack.
_library = torch.library.Library("kdfast", "FRAGMENT")
_library.define(
    "unpack(Tensor data, Tensor offset, Tensor top, Tensor? k_eff, int kept, int vocab_size, int grid) "
    "-> (Tensor ids, Tensor logprobs)"
)


def unpacked_like(offset: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Memory for ids and log-probabilities, (..., kept) each, of tokens (...)."""
    shape = (*offset.shape, kept)
    ids = torch.empty(shape, dtype=torch.int32, device=offset.device)
    return ids, torch.empty(shape, dtype=torch.float32, device=offset.device)


torch.library.register_fake("kdfast::unpack", lambda data, offset, top, k_eff, kept, *_: unpacked_like(offset, kept))


@dataclass(frozen=True, eq=False)
class PackedTargets:
    """The bytes of the fixed tier of a cache, token by token; made by :meth:`kdfast.cache.Reader.packed`.

    A token is its ids of ceil(log2 vocab_size) bits each, the differences of its log-probabilities in 4 bits each, and
    what did not fit in those: with K = 64 of 128,000 columns about 136 + 32 bytes, where :class:`kdfast.SparseTargets`
    has 512. Whoever moves a batch to a GPU moves that, and :func:`kdfast.distill_loss` unpacks it there in registers.
    Entry i has log-probability ``top - steps_i 2^-grid``, rounded once to fp32: the same bits wherever it is done.

    What the reader gave has been verified: checksums, and every value. The loss does not look again.

    Args:
        data: (bytes,) uint8, contiguous, a whole number of 4 bytes: the tokens, in any order, shared by slices.
        offset: (...) int32, where each token begins in ``data``, in units of 4 bytes.
        top: (...) fp32, the log-probability of each token's first entry, nats.
        kept: K, 1 to 65535.
        vocab_size: V, the number of columns the teacher had, up to 2^24.
        grid: a step is 2^-grid nats, 2 to 10.
        lse: {T: (...)} fp32 as in SparseTargets, with None for T = 1, where it is 0.
        k_eff: (...) int32, entries in use, or None where all K are.
        method: "topk" or "topp".
        gold_logprob: (...) fp32, log q of the token that was there, where it was recorded.

    Raises:
        TypeError: a field that is no tensor, or of another dtype.
        ValueError: sizes that no cache has, or shapes and devices that do not fit.

    Source:
        ``csrc/cache/FORMAT.md``, section 6.1.
    """

    data: Tensor
    offset: Tensor
    top: Tensor
    _: KW_ONLY
    kept: int
    vocab_size: int
    grid: int
    lse: Mapping[float, Tensor | None] | None = None
    k_eff: Tensor | None = None
    method: str = "topk"
    gold_logprob: Tensor | None = None

    def __post_init__(self) -> None:
        if self.method not in ("topk", "topp"):
            why = " (drawn targets are not of the fixed tier)" if self.method in SAMPLED else ""
            msg = f"PackedTargets: method must be topk or topp, got {self.method!r}{why}"
            raise ValueError(msg)
        limits = {"kept": (1, 65535), "vocab_size": (1, 1 << 24), "grid": (2, 10)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                msg = f"PackedTargets: {name} must be {least} to {most}, got {getattr(self, name)}"
                raise ValueError(msg)
        per_token = {"offset": self.offset, "top": self.top, "k_eff": self.k_eff, "gold_logprob": self.gold_logprob}
        per_token |= {f"lse[{t:g}]": v for t, v in (self.lse or {}).items()}
        dtypes = {"data": torch.uint8, "offset": torch.int32, "k_eff": torch.int32}
        for name, value in {"data": self.data, **per_token}.items():
            if value is None and name not in ("data", "offset", "top"):
                continue
            if not isinstance(value, Tensor) or value.dtype != dtypes.get(name, torch.float32):
                got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
                msg = f"PackedTargets: {name} must be a {dtypes.get(name, torch.float32)} tensor, got {got}"
                raise TypeError(msg)
            if value.device != self.data.device:
                msg = f"PackedTargets: {name} is on {value.device}, data on {self.data.device}: move all with .to()"
                raise ValueError(msg)
            if name != "data" and value.shape != self.offset.shape:
                msg = f"PackedTargets: {name} must be {tuple(self.offset.shape)} as offset, got {tuple(value.shape)}"
                raise ValueError(msg)
        whole = self.data.dim() == 1 and self.data.is_contiguous() and self.data.numel() % WORD == 0
        if not whole or self.data.storage_offset() % WORD:
            msg = (
                f"PackedTargets: data must be (bytes,), contiguous, from a multiple of {WORD} to one, got shape "
                f"{tuple(self.data.shape)}, stride {self.data.stride()}, beginning at {self.data.storage_offset()}"
            )
            raise ValueError(msg)

    @classmethod
    def _checked(cls, fields: Mapping[str, Any]) -> PackedTargets:
        """Targets of all their fields, which whoever made them has checked: that takes longer than a short read."""
        targets = object.__new__(cls)
        vars(targets).update(fields)
        return targets

    @property
    def shape(self) -> torch.Size:
        """Shape of the targets, (..., K)."""
        return torch.Size((*self.offset.shape, self.kept))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.data.device

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures at which these targets are exact."""
        return tuple(sorted({1.0, *(self.lse or {})}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what a copy to another device moves."""
        tensors = [self.data, *self._per_token().values(), *(self.lse or {}).values()]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def _parts(self) -> dict[str, Tensor | None]:
        return {"data": self.data, **self._per_token()} | {f"lse[{t:g}]": v for t, v in (self.lse or {}).items()}

    def _per_token(self) -> dict[str, Tensor | None]:
        return {k: getattr(self, k) for k in ("offset", "top", "k_eff", "gold_logprob")}

    def _all_k_eff(self) -> Tensor:
        return torch.full_like(self.offset, self.kept) if self.k_eff is None else self.k_eff

    def _replaced(self, data: Tensor, fn: Callable[[Tensor], Tensor]) -> PackedTargets:
        changed: dict[str, Any] = {k: None if v is None else fn(v) for k, v in self._per_token().items()}
        if self.lse is not None:
            changed["lse"] = {t: None if v is None else fn(v) for t, v in self.lse.items()}
        return replace(self, data=data, **changed)

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedTargets:
        """The targets with ``fn`` applied to each of their tensors, ``data`` among them."""
        return self._replaced(fn(self.data), fn)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedTargets:
        """The same targets on another device; with ``non_blocking`` from pinned memory, without waiting."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedTargets:
        """The same targets in pinned memory, as ``DataLoader(pin_memory=True)`` asks for it."""
        return self.map(lambda t: t.pin_memory())

    def __getitem__(self, index: Any) -> PackedTargets:
        """Targets of some tokens: ``index`` runs over the leading axes, never over K. The bytes are shared."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > self.offset.dim() or any(i is Ellipsis for i in index):
            msg = f"PackedTargets: at most {self.offset.dim()} indices, none of them '...', got {len(index)}"
            raise IndexError(msg)
        return self._replaced(self.data, lambda t: t[index])

    @classmethod
    def stack(cls, targets: Sequence[PackedTargets]) -> PackedTargets:
        """Join targets of equal shape along a new leading axis; a token's k_eff is 0 where it is padding.

        Raises:
            ValueError: nothing to join, targets that differ in shape, K, method, vocabulary, grid, temperatures or the
                fields they carry, or together more than 2^33 bytes.
        """
        return cls._joined("stack", targets, torch.stack)

    @classmethod
    def cat(cls, targets: Sequence[PackedTargets]) -> PackedTargets:
        """Join targets along their first axis.

        Raises:
            ValueError: as :meth:`stack`, but that the first axis may differ.
        """
        return cls._joined("cat", targets, torch.cat)

    @classmethod
    def _joined(cls, name: str, targets: Sequence[PackedTargets], join: Any) -> PackedTargets:
        if not targets:
            msg = f"PackedTargets.{name}: needs at least one"
            raise ValueError(msg)
        first = targets[0]
        kinds = {(t.method, t.kept, t.vocab_size, t.grid, tuple(t.lse or ())) for t in targets}
        if len(kinds) > 1:
            msg = f"PackedTargets.{name}: (method, K, vocab_size, grid, temperatures) must agree, got {sorted(kinds)}"
            raise ValueError(msg)
        shapes = {t.offset.shape if name == "stack" else t.offset.shape[1:] for t in targets}
        if len(shapes) > 1:
            msg = f"PackedTargets.{name}: shapes must agree, got {sorted(tuple(s) for s in shapes)}"
            raise ValueError(msg)
        words, begins = 0, []
        for t in targets:
            begins.append(words)
            words += t.data.numel() // WORD
        if words > 2**31 - 1:
            msg = f"PackedTargets.{name}: {WORD * words} bytes together, more than 2^33: join fewer"
            raise ValueError(msg)

        def joined(values: list[Tensor | None]) -> Tensor | None:
            present = [v for v in values if v is not None]
            if len(present) not in (0, len(values)):
                msg = f"PackedTargets.{name}: a field is there in some targets and missing in others"
                raise ValueError(msg)
            return join(present) if present else None

        fields: dict[str, Any] = {k: [t._per_token()[k] for t in targets] for k in first._per_token()}
        fields["offset"] = [t.offset + begin for t, begin in zip(targets, begins, strict=True)]
        if any(k is not None for k in fields["k_eff"]):  # without, a token has K
            fields["k_eff"] = [t._all_k_eff() for t in targets]
        changed: dict[str, Any] = {k: joined(v) for k, v in fields.items()}
        if first.lse is not None:
            changed["lse"] = {t: joined([(one.lse or {})[t] for one in targets]) for t in first.lse}
        return replace(first, data=torch.cat([t.data for t in targets]), **changed)

    def padded(self, length: int) -> PackedTargets:
        """(S, K) as (length, K): more tokens at the end, without an entry.

        Raises:
            ValueError: targets that have not one leading axis, or more tokens than that.
        """
        more = length - len(self.offset) if self.offset.dim() == 1 else -1
        if more < 0:
            msg = f"PackedTargets.padded: (S, {self.kept}) with S <= {length}, got {tuple(self.shape)}"
            raise ValueError(msg)
        every = replace(self, k_eff=self._all_k_eff())
        return every._replaced(self.data, lambda t: torch.nn.functional.pad(t, (0, more)))

    def unpack(self) -> SparseTargets:
        """The targets as tensors, equal to what :meth:`kdfast.cache.Reader.read` gives.

        On the CPU by the decoder that the reader has, on a GPU by a Triton kernel.

        Raises:
            ValueError: on the CPU, bytes that no reader gave.
            RuntimeError: on a GPU, without Triton.
        """
        ids, logprobs = torch.ops.kdfast.unpack(
            self.data, self.offset, self.top, self.k_eff, self.kept, self.vocab_size, self.grid
        )
        lse = None
        if self.lse is not None:
            lse = {t: torch.zeros_like(self.top) if v is None else v for t, v in self.lse.items()}
        return SparseTargets(
            ids,
            logprobs,
            vocab_size=self.vocab_size,
            lse=lse,
            k_eff=self.k_eff,
            method=self.method,
            gold_logprob=self.gold_logprob,
        )


PackedTargets.__module__ = "kdfast"  # where it is for users, and for what they pickle
