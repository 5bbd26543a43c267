"""The public capture of a teacher: ``soft_targets``, logits in, sparse targets out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdfast.loss import _is_dtensor
from kdfast.ops import _registry
from kdfast.ops.eager import outside_graphs
from kdfast.spec.head import LMHead
from kdfast.spec.problem import Logits, _check_logits, _choice
from kdfast.spec.selection import Request, Selected
from kdfast.spec.sparse import METHODS, SAMPLED, SparseTargets

Method: TypeAlias = Literal["topk", "topp", "sample", "pps"]

#: Bytes of logits, or of the reference's fp64 copies, that a chunk of tokens may take.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}

_MOST_K = 2**31 - 1


@outside_graphs
@torch.no_grad()
def soft_targets(
    logits_or_head: Logits,
    *,
    k: int | tuple[int, int] = 64,
    method: Method = "topk",
    temperatures: Sequence[float] = (1.0,),
    seed: int | None = None,
    p: float | None = None,
) -> SparseTargets:
    r"""A teacher's distributions as K entries per token, in one pass over its logits.

    With x the logits of a token, L = logsumexp(x) and q_T = softmax(x / T):

    ========== ===================================================================== =========================
    method     entries                                                               mass of an entry
    ========== ===================================================================== =========================
    "topk"     the k most probable columns, ties to the lower id                     None: exp(logprobs)
    "topp"     the fewest of them whose mass under q_1 reaches ``p``                 None: exp(logprobs)
    "sample"   what k draws from q_T with replacement met                            draws of it / k
    "pps"      column i with probability pi = min(1, l q_T(i)), where sum pi = k     q_T(i) / pi = max(q_T(i), 1/l)
    ========== ===================================================================== =========================

    The sampled methods are unbiased, E[mass of column i] = q_T(i), and "pps" (threshold sampling, drawn systematically)
    has the lower variance: it keeps what is probable for certain and draws the tail. Their draws depend on ``seed`` and
    the number of the token, counted over the leading axes, and on nothing else: not on the backend, the number of
    threads or how tokens were chunked.

    Args:
        logits_or_head: (..., V) fp32, bf16, fp16 or fp64, any strides; or a :class:`kdfast.LMHead`, whose logits then
            exist for a chunk of tokens at a time.
        k: entries per token, at least 1: K of the result, also where V or what there is to keep is less. For "sample"
            the number of draws. For "topp" also a pair (least, most).
        method: see above.
        temperatures: at each of which the log-normaliser is captured, so that a loss at it is exact; > 0. Sampled
            methods draw at the one temperature there is.
        seed: in [0, 2^63); None draws one from torch's generator. Without meaning to "topk" and "topp".
        p: mass that "topp" keeps, in (0, 1]; for that method only.

    Returns:
        :class:`kdfast.SparseTargets` on the device of the logits: ``ids`` (..., K) int32, by falling probability for
        "topk" and "topp" and ascending for the sampled methods, -1 from ``k_eff`` (...) int32 on; ``logprobs`` (..., K)
        fp32, x - L, at temperature 1 over all V columns for every method; ``lse`` {T: (...)} fp32,
        logsumexp((x - L) / T); for the sampled methods ``mass`` (..., K) fp32 and ``neg_entropy`` (...) fp32, the sum
        of mass * log q_T. What the most probable column lacks of 1 is right to about 1e-6 of itself for T >= 1, and so
        is a tail relative to that. Columns of -inf are never kept, nor are drawn ones whose mass
        is 0 in fp32. A token with a NaN or +inf among its logits, or nothing but -inf, is NaN throughout, and its ids
        are 0, 1, ...

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value that cannot be meant, an unknown method, or several temperatures for a sampled method.
        RuntimeError: KDFAST_BACKEND names a backend that cannot serve this call.

    Source:
        Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870 (distillation from draws); Madow, "On the
        theory of systematic sampling, II", Annals of Mathematical Statistics 20, 1949.

    Example:
        >>> targets = soft_targets(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), k=2, temperatures=(1.0, 4.0))
        >>> targets.ids.tolist(), targets.temperatures
        ([[1, 3]], (1.0, 4.0))
    """
    _check_logits("logits_or_head", logits_or_head)
    parts_of = (
        [logits_or_head]
        if isinstance(logits_or_head, Tensor)
        else [x for x in logits_or_head.tensors() if x is not None]
    )
    if any(_is_dtensor(x) for x in parts_of):
        msg = "logits_or_head must be a plain tensor, got a DTensor: pass x.to_local() where whole rows are held"
        raise TypeError(msg)
    request = _request(k, method, temperatures, seed, p)
    backend = _registry.selector(logits_or_head, request)
    leading, v = logits_or_head.shape[:-1], logits_or_head.shape[-1]
    run = backend.select
    by_kernel = backend.name != "reference"
    if by_kernel and isinstance(logits_or_head, Tensor) and (logits_or_head.stride(-1) == 1 or v == 1):
        # as it lies; a leading axis is added to a single token's logits, so that chunks can be joined
        parts = [run(logits_or_head if leading else logits_or_head[None], request, 0)]
    else:
        parts = [run(x, request, first) for first, x in _chunks(logits_or_head, widened=not by_kernel)]
    return _targets(parts, leading, v, request)


# --- Arguments --------------------------------------------------------------------------------------------------------


def _request(k: object, method: object, temperatures: object, seed: object, p: object) -> Request:
    _choice("method", method, METHODS)
    assert isinstance(method, str)
    least, most = _bounds(k, method)
    if method != "topp" and p is not None:
        msg = f'p is the mass that method="topp" keeps, got p={p!r} with method={method!r}: leave p out'
        raise ValueError(msg)
    if method == "topp":
        if p is None:
            msg = 'p must be given with method="topp": the mass to keep, such as p=0.95'
            raise ValueError(msg)
        if isinstance(p, bool) or not isinstance(p, numbers.Real):
            msg = f"p must be a number in (0, 1], got {type(p).__name__}"
            raise TypeError(msg)
        if not 0 < float(p) <= 1:
            msg = f"p must be in (0, 1], got {p!r}"
            raise ValueError(msg)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu").item()) if method in SAMPLED else 0
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        msg = f"seed must be an int or None, got {type(seed).__name__}"
        raise TypeError(msg)
    if not 0 <= int(seed) < 2**63:
        msg = f"seed must be in [0, 2**63), got {seed}"
        raise ValueError(msg)
    mass = float(p) if isinstance(p, numbers.Real) else 1.0
    return Request(method, most, least, mass, _temperatures(temperatures, method), int(seed))


def _bounds(k: object, method: str) -> tuple[int, int]:
    """The least and the most entries."""
    pair = isinstance(k, (tuple, list))
    if pair and method != "topp":
        msg = f'k as a pair (least, most) is for method="topp", got {k!r} with method={method!r}: pass an int'
        raise ValueError(msg)
    bounds: list[object] = list(k) if isinstance(k, (tuple, list)) else [1, k]
    counts = [int(x) for x in bounds if isinstance(x, numbers.Integral) and not isinstance(x, bool)]
    if len(bounds) != 2 or len(counts) != 2:
        msg = f"k must be an int{' or a pair (least, most) of ints' if method == 'topp' else ''}, got {k!r}"
        raise TypeError(msg)
    least, most = counts
    if not 1 <= least <= most <= _MOST_K:
        what = "(least, most) with 1 <= least <= most" if pair else "at least 1"
        msg = f"k must be {what} and at most {_MOST_K}, got {k!r}"
        raise ValueError(msg)
    return least, most


def _temperatures(temperatures: object, method: str) -> tuple[float, ...]:
    if not isinstance(temperatures, Sequence) or isinstance(temperatures, str):
        got = type(temperatures).__name__
        msg = f"temperatures must be a sequence of numbers, such as (1.0, 2.0), got {got}"
        raise TypeError(msg)
    for t in temperatures:
        if isinstance(t, bool) or not isinstance(t, numbers.Real):
            msg = f"temperatures must be numbers, got {type(t).__name__}: {t!r}"
            raise TypeError(msg)
        if not 0 < float(t) < math.inf:
            msg = f"temperatures must be > 0 and finite, got {t!r}"
            raise ValueError(msg)
    distinct = tuple(dict.fromkeys(float(t) for t in temperatures))
    if not distinct or (method in SAMPLED and len(distinct) > 1):
        many = "one temperature, that at which entries are drawn" if method in SAMPLED else "at least one temperature"
        msg = f"temperatures must hold {many} with method={method!r}, got {tuple(temperatures)!r}"
        raise ValueError(msg)
    return distinct


# --- Chunks of tokens -------------------------------------------------------------------------------------------------


def _chunks(x: Logits, *, widened: bool) -> Iterator[tuple[int, Tensor]]:
    """Logits (n, V) of some tokens at a time, with the number of the first; one empty chunk where there are none.

    Those that are going to be widened to fp64 are counted as such.
    """
    rows = x if isinstance(x, Tensor) else x.hidden
    rows = rows.reshape(-1, rows.shape[-1])
    if isinstance(x, LMHead):
        x = x.map_tokens(lambda of_tokens: of_tokens.reshape(-1, of_tokens.shape[-1]))
    row_bytes = x.shape[-1] * (8 if widened else rows.element_size())
    if isinstance(x, LMHead) and not x.cap.plain:
        row_bytes += x.shape[-1] * (2 * max(4, rows.element_size()) + 1)  # what the cap makes of the product
    step = max(1, CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cpu"]) // row_bytes)
    for first in range(0, max(1, len(rows)), step):
        tokens = slice(first, first + step)
        yield first, rows[tokens] if isinstance(x, Tensor) else x.map_tokens(itemgetter(tokens)).logits()


def _targets(parts: list[Selected], leading: torch.Size, v: int, request: Request) -> SparseTargets:
    def joined(name: str, *axes: int) -> Tensor | None:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces).reshape((*leading, *axes))

    ids, lse = torch.cat([part.ids for part in parts]), torch.cat([part.lse for part in parts], 1)
    return SparseTargets(
        ids.reshape((*leading, request.most)),
        joined("logprobs", request.most),
        vocab_size=v,
        lse={t: x.reshape(leading) for t, x in zip(request.temperatures, lse, strict=True)},
        k_eff=joined("k_eff"),
        method=request.method,
        mass=joined("mass", request.most),
        neg_entropy=joined("neg_entropy"),
    )
