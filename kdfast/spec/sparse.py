"""A teacher's distribution as a few entries per token."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdfast.spec.served import Candidates, openai_tokens, rows, sglang_tokens, shifted, vllm_tokens
from kdfast.spec.values import readable

#: Methods whose entries are drawn, not chosen: their weights are unbiased estimates, not probabilities.
SAMPLED = ("sample", "pps")
METHODS = ("topk", "topp", *SAMPLED)


def _narrowed(ids: Tensor, vocab_size: int) -> Tensor:
    """Int64 ids as int32; what is out of range stays so, where it cannot be looked at."""
    if readable(ids) and ids.numel():
        least, most = (int(x) for x in ids.aminmax())
        if least < -1 or most >= vocab_size:
            worst = most if most >= vocab_size else least
            msg = f"SparseTargets: ids must be in [0, {vocab_size}), or -1 beyond k_eff, got {worst}"
            raise ValueError(msg)
    return ids.clamp(-2, torch.iinfo(torch.int32).max).int()


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """A teacher's distribution as K entries per token.

    Args:
        ids: (..., K) int32, column numbers; -1 in the places from ``k_eff`` on. Anywhere in a token -1 is no entry:
            what stands beside it in ``logprobs`` and ``mass`` is not read, and its mass is the tail's. int64 becomes
            int32.
        logprobs: (..., K) fp32, nats, at temperature 1 over the full vocabulary; None only for sampled methods.
        vocab_size: V, the number of columns the teacher had.
        lse: {T: (...)} fp32, logsumexp over the vocabulary of (full logprobs / T), so that
            log q_T(i) = logprobs_i / T - lse[T]; T = 1 need not be there (it is 0). The mass of the tail follows from
            the entries to about 1e-6 (1 - the largest q); one of which their rounding leaves nothing counts as 2^-120.
        k_eff: (...) int32, entries in use, or None where all K are.
        method: "topk", "topp", "sample" (multinomial counts) or "pps" (threshold sampling).
        mass: (..., K) fp32, weight of an entry in the estimate; None for topk and topp, where it is exp(logprobs).
        neg_entropy: (...) fp32, sum of mass * log q: makes a sampled loss a KL and not a cross-entropy.
        gold_logprob: (...) fp32, log q of the token that was there, where it was recorded.

    Raises:
        TypeError: a ``vocab_size`` that is no int.
        ValueError: an unknown method, a ``vocab_size`` below 1, shapes that do not fit, a method without the fields
            it needs, or int64 ids out of range (on the CPU; on a GPU the loss is NaN there).
    """

    ids: Tensor
    logprobs: Tensor | None
    _: KW_ONLY
    vocab_size: int
    lse: Mapping[float, Tensor] | None = None
    k_eff: Tensor | None = None
    method: str = "topk"
    mass: Tensor | None = None
    neg_entropy: Tensor | None = None
    gold_logprob: Tensor | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            msg = f"SparseTargets: method must be one of {', '.join(METHODS)}, got {self.method!r}"
            raise ValueError(msg)
        size = self.vocab_size
        if not isinstance(size, (int, numbers.Integral)) or isinstance(size, bool):
            msg = f"SparseTargets: vocab_size must be an int, the teacher's number of columns, got {size!r}"
            raise TypeError(msg)
        if size < 1:
            msg = f"SparseTargets: vocab_size must be at least 1, got {size}"
            raise ValueError(msg)
        if not isinstance(size, int):  # NumPy's
            object.__setattr__(self, "vocab_size", int(size))
        if self.ids.dtype not in (torch.int32, torch.int64) or self.ids.dim() < 1:
            msg = f"SparseTargets: ids must be (..., K) int32 or int64, got {tuple(self.ids.shape)} {self.ids.dtype}"
            raise ValueError(msg)
        if self.ids.dtype == torch.int64:
            object.__setattr__(self, "ids", _narrowed(self.ids, self.vocab_size))
        if self.method in SAMPLED:
            if self.mass is None or self.neg_entropy is None:
                msg = f"SparseTargets: method {self.method!r} needs mass and neg_entropy"
                raise ValueError(msg)
        elif self.logprobs is None:
            msg = f"SparseTargets: method {self.method!r} needs logprobs"
            raise ValueError(msg)
        for name, value in (("logprobs", self.logprobs), ("mass", self.mass)):
            if value is not None and value.shape != self.ids.shape:
                msg = f"SparseTargets: {name} must be {tuple(self.ids.shape)} as ids, got {tuple(value.shape)}"
                raise ValueError(msg)
        per_token = {"k_eff": self.k_eff, "neg_entropy": self.neg_entropy, "gold_logprob": self.gold_logprob}
        per_token |= {f"lse[{t:g}]": v for t, v in (self.lse or {}).items()}
        for name, value in per_token.items():
            if value is not None and value.shape != self.ids.shape[:-1]:
                msg = f"SparseTargets: {name} must be {tuple(self.ids.shape[:-1])}, got {tuple(value.shape)}"
                raise ValueError(msg)
        for name, value in (per_token | {"logprobs": self.logprobs, "mass": self.mass}).items():
            if value is None:
                continue
            if value.device != self.ids.device:
                msg = f"SparseTargets: {name} is on {value.device}, ids on {self.ids.device}: move all with .to(device)"
                raise ValueError(msg)
            if name != "k_eff" and not value.is_floating_point():
                msg = f"SparseTargets: {name} must be floating point, got {value.dtype}"
                raise ValueError(msg)

    @classmethod
    def _checked(cls, fields: Mapping[str, Any]) -> SparseTargets:
        """Targets of all their fields, which whoever made them has checked: that takes longer than a short read."""
        targets = object.__new__(cls)
        vars(targets).update(fields)
        return targets

    @classmethod
    def _served(cls, tokens: Sequence[Candidates | None], vocab_size: int, k: int | None, source: str) -> SparseTargets:
        found = rows(tokens, vocab_size, k, f"SparseTargets.{source}")
        return cls(vocab_size=vocab_size, **found._asdict())

    @classmethod
    def from_vllm(
        cls,
        prompt_logprobs: Sequence[Mapping[Any, Any] | None],
        *,
        vocab_size: int,
        token_ids: Sequence[int] | None = None,
        k: int | None = None,
    ) -> SparseTargets:
        """What vLLM tells of a prompt of S tokens, as targets (S, K).

        Row i is the distribution of token i + 1, as a language model's logits of position i are, from entry i + 1: the
        first entry is None, and the last row has no entries. vLLM gives the K most probable tokens and the one that is
        there, which is left out where its rank is beyond K, so that every row holds its most probable tokens; with
        ``token_ids`` its log-probability is ``gold_logprob``. All are at temperature 1 over the whole vocabulary
        (``logprobs_mode="raw_logprobs"``, vLLM's default); a loss at another temperature refuses them.

        Args:
            prompt_logprobs: of a ``RequestOutput``, for ``SamplingParams(prompt_logprobs=K)``, or of a server's JSON,
                whose keys are text.
            vocab_size: V, the number of columns of the teacher's logits.
            token_ids: (S,) of the prompt; checked to be those that the entries are of.
            k: entries to keep of each token; None: all.

        Raises:
            ValueError: entries that are missing, of another prompt, out of range, twice there, no log-probabilities,
                or of a mass above 1.
        """
        told = vllm_tokens(prompt_logprobs, token_ids, "SparseTargets.from_vllm")
        targets = cls._served(shifted(told, "SparseTargets.from_vllm"), vocab_size, k, "from_vllm")
        return targets if token_ids is not None else replace(targets, gold_logprob=None)

    @classmethod
    def from_sglang(
        cls,
        meta_info: Mapping[str, Any],
        *,
        vocab_size: int,
        token_ids: Sequence[int] | None = None,
        k: int | None = None,
    ) -> SparseTargets:
        """What SGLang tells of the S tokens of an input that it was asked about, as targets (S, K).

        Rows as in :meth:`from_vllm`, ``gold_logprob`` of every token; where the request had ``logprob_start_len`` > 0
        they begin at that token. What it tells of generated tokens is not taken: it depends on the temperature that
        they were drawn at.

        Args:
            meta_info: of an answer of ``/generate`` or of ``Engine.generate``, for ``return_logprob=True``,
                ``logprob_start_len=0`` and ``top_logprobs_num=K``.
            vocab_size: V, the number of columns of the teacher's logits.
            token_ids: (S,) of the input; checked to be those that the server was given.
            k: entries to keep of each token; None: all.

        Raises:
            ValueError: as :meth:`from_vllm`.
        """
        told = sglang_tokens(meta_info, token_ids, "SparseTargets.from_sglang")
        return cls._served(shifted(told, "SparseTargets.from_sglang"), vocab_size, k, "from_sglang")

    @classmethod
    def from_openai(
        cls,
        logprobs: Any,
        *,
        vocab_size: int,
        ids_of: Callable[[str, bytes | None], int | None] | None = None,
        k: int | None = None,
    ) -> SparseTargets:
        """What a chat completion tells of the S tokens that it generated, as targets (S, K), K at most 20.

        Row i is the distribution that generated token i was drawn from: it stands beside the student's logits of the
        position before that token. ``gold_logprob`` is that of the token, -inf where it is not told (-9999). Whether
        the server's log-probabilities are at temperature 1 whatever it samples at, its documents say; targets are
        taken to be.

        Args:
            logprobs: ``choices[0].logprobs``, as an object or JSON, for ``logprobs=True`` and ``top_logprobs=20``.
            vocab_size: V, the number of columns of the teacher's logits.
            ids_of: the id of a token, of its text and bytes (None where the server gives none), or None of one that
                it does not know, which is an error. None: texts are ``token_id:N``, as vLLM writes them where it is
                asked for ``return_tokens_as_token_ids``.
            k: entries to keep of each token; None: all.

        Raises:
            ValueError: no ``content``, a token without an id, or as :meth:`from_vllm`.
        """
        told = openai_tokens(logprobs, ids_of, "SparseTargets.from_openai")
        return cls._served(told, vocab_size, k, "from_openai")

    @property
    def shape(self) -> torch.Size:
        """Shape of the targets, (..., K)."""
        return self.ids.shape

    @property
    def valid(self) -> Tensor:
        """(..., K) bool: the entries in use."""
        return self.ids >= 0

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures at which these targets are exact."""
        return tuple(sorted({1.0, *(self.lse or {})}))

    def map(self, fn: Callable[[Tensor], Tensor]) -> SparseTargets:
        """The targets with ``fn`` applied to each of their tensors."""
        changed: dict[str, Any] = {k: None if v is None else fn(v) for k, v in self._tensors().items()}
        changed["lse"] = None if self.lse is None else {t: fn(v) for t, v in self.lse.items()}
        return replace(self, **changed)

    def _parts(self) -> dict[str, Tensor | None]:
        return self._tensors() | {f"lse[{t:g}]": v for t, v in (self.lse or {}).items()}

    def _tensors(self) -> dict[str, Tensor | None]:
        return {k: getattr(self, k) for k in ("ids", "logprobs", "k_eff", "mass", "neg_entropy", "gold_logprob")}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device; with ``non_blocking`` from pinned memory, without waiting."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def __getitem__(self, index: Any) -> SparseTargets:
        """Targets of some tokens: ``index`` runs over the leading axes, never over K."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > self.ids.dim() - 1 or any(i is Ellipsis for i in index):
            msg = f"SparseTargets: at most {self.ids.dim() - 1} indices, none of them '...', got {len(index)}"
            raise IndexError(msg)
        return self.map(lambda t: t[index])

    @classmethod
    def stack(cls, targets: Sequence[SparseTargets]) -> SparseTargets:
        """Join targets of equal shape along a new leading axis.

        Raises:
            ValueError: nothing to stack, or targets that differ in shape, method, vocabulary, temperatures or the
                fields they carry.
        """
        shapes = {tuple(t.shape) for t in targets}
        if len(shapes) > 1:
            msg = f"SparseTargets.stack: shapes (..., K) must agree, got {sorted(shapes)}"
            if len({shape[:-1] for shape in shapes}) == 1:
                msg += ": pad ids with -1, logprobs and mass with 0, to the largest K"
            raise ValueError(msg)
        return cls._joined("stack", targets, torch.stack)

    @classmethod
    def cat(cls, targets: Sequence[SparseTargets]) -> SparseTargets:
        """Join targets (n, ..., K) along their first axis; those of a smaller K are padded with ids of -1.

        Raises:
            ValueError: nothing to join, or targets that differ in the axes between the first and K, in method,
                vocabulary, temperatures or the fields they carry.
        """
        shapes = {tuple(t.shape) for t in targets}
        if min(map(len, shapes), default=2) < 2 or len({shape[1:-1] for shape in shapes}) > 1:
            msg = f"SparseTargets.cat: shapes (n, ..., K) must agree but in n and K, got {sorted(shapes)}"
            raise ValueError(msg)
        most = max((shape[-1] for shape in shapes), default=0)
        return cls._joined("cat", [t if t.shape[-1] == most else t._padded(most) for t in targets], torch.cat)

    def _padded(self, most: int) -> SparseTargets:
        """The same targets with ``most`` entries a token, of which those added are not in use."""
        more = (0, most - self.shape[-1])
        ids = torch.nn.functional.pad(self.ids, more, value=-1)
        fills = {"logprobs": (self.logprobs, -math.inf), "mass": (self.mass, 0.0)}
        wider = {k: None if x is None else torch.nn.functional.pad(x, more, value=y) for k, (x, y) in fills.items()}
        return replace(self, ids=ids, k_eff=self._all_k_eff(), **wider)  # type: ignore[arg-type]  # Tensor | None

    def _all_k_eff(self) -> Tensor:
        return self.valid.sum(-1, dtype=torch.int32) if self.k_eff is None else self.k_eff

    @classmethod
    def _joined(cls, name: str, targets: Sequence[SparseTargets], join: Callable[..., Tensor]) -> SparseTargets:
        if not targets:
            msg = f"SparseTargets.{name}: needs at least one"
            raise ValueError(msg)
        first = targets[0]
        kinds = {(t.method, t.vocab_size, tuple(sorted(t.lse or ()))) for t in targets}
        if len(kinds) > 1:
            msg = f"SparseTargets.{name}: (method, vocab_size, temperatures) must agree, got {sorted(kinds)}"
            raise ValueError(msg)

        def joined(field: str) -> Tensor | None:
            present = [v for v in (t._tensors()[field] for t in targets) if v is not None]
            if field == "k_eff" and present:  # without, a token has K
                present = [t._all_k_eff() for t in targets]
            if len(present) not in (0, len(targets)):
                msg = f"SparseTargets.{name}: {field} is there in some targets and missing in others"
                raise ValueError(msg)
            return join(present) if present else None

        changed: dict[str, Any] = {field: joined(field) for field in first._tensors()}
        if first.lse is not None:
            changed["lse"] = {t: join([s.lse[t] for s in targets if s.lse]) for t in first.lse}
        return replace(first, **changed)

    def dense(self) -> Tensor:
        """(..., V) fp32: the weight that each column carries; for tests and inspection."""
        weight = self.mass if self.mass is not None else self.logprobs.exp()  # type: ignore[union-attr]
        weight = torch.where(self.valid, weight, 0.0)
        out = torch.zeros((*self.ids.shape[:-1], self.vocab_size), dtype=weight.dtype, device=weight.device)
        return out.scatter_add(-1, self.ids.clamp(min=0).long(), weight)


SparseTargets.__module__ = "kdfast"  # where it is for users, and for what they pickle
