r"""Sparse targets in plain PyTorch: the specification of every backend, for any device.

Arithmetic is fp64. With x a row of logits, L = logsumexp(x) and q_T = softmax(x / T),
logsumexp(x / T) = max(x) / T + log1p(the exponentials beside that of the largest column), so that what a sure teacher
leaves to the others keeps its digits.

topk    the k largest columns, larger logits first and lower ids first among equals; columns of -inf never.
topp    as many of them as it takes for their mass under q_1 to reach p, within bounds.
sample  k draws from q_T with replacement: u uniform falls to the first column i with sum_{j <= i} q_j > u.
pps     column i is there with probability pi_i = min(1, l q_T(i)), where sum pi = k. Those with pi = 1 are; the others
        lie side by side along a line, each as long as its pi, and are met by points at u, u + 1, u + 2, ...
        (systematic sampling, Madow 1949). E[mass_i] = q_T(i), as mass_i is q_T(i) / pi_i = max(q_T(i), 1 / l).

A row without a finite L is NaN in every output, with columns 0, 1, ... as its entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.spec.sparse import SAMPLED

INF = float("inf")


class Request(NamedTuple):
    """The checked arguments of :func:`kdfast.soft_targets` but the logits."""

    method: str
    most: int  # K: entries there is room for, and draws
    least: int  # topp: entries to keep whatever their mass
    p: float  # topp
    temperatures: tuple[float, ...]  # distinct; one of a sampled method
    seed: int  # in [0, 2^63)

    @property
    def sampled(self) -> bool:
        """Whether entries are drawn."""
        return self.method in SAMPLED


class Selected(NamedTuple):
    """Targets of a chunk of tokens, (...)."""

    ids: Tensor  # (..., K) int32, -1 from k_eff on
    logprobs: Tensor  # (..., K) fp32, x - L; -inf from k_eff on
    lse: Tensor  # (temperatures, ...) fp32, logsumexp((x - L) / T)
    k_eff: Tensor  # (...) int32
    mass: Tensor | None  # (..., K) fp32, sampled methods
    neg_entropy: Tensor | None  # (...) fp32, sampled methods


def select(logits: Tensor, request: Request, first_token: int) -> Selected:
    """Targets of logits (n, V), token numbers counted from ``first_token``."""
    x = logits.double()
    n, v = x.shape
    most, room = request.most, min(request.most, v)
    log_z = torch.logsumexp(x, -1, keepdim=True)
    bad = ~log_z.isfinite()
    x = torch.where(bad, 0.0, x)  # a row of its own kind, overwritten below
    top, at = x.max(-1, keepdim=True)

    def log_sum(t: float) -> Tensor:
        """Of the exponentials relative to the largest, (n, 1)."""
        return ((x - top) / t).exp().scatter(-1, at, 0.0).sum(-1, keepdim=True).log1p()

    log_one = log_sum(1.0)
    log_q = x - top - log_one
    lse = torch.cat([log_sum(t) - log_one / t for t in request.temperatures], -1).T
    mass = neg_entropy = None
    if request.sampled:
        tau = request.temperatures[0]
        log_q_tau = log_q / tau - lse[0][:, None]
        tokens = first_token + torch.arange(n, device=x.device)
        weights = (_multinomial if request.method == "sample" else _pps)(log_q_tau.exp(), request, tokens)
        column = torch.where(weights.float() > 0, torch.arange(v, device=x.device), v)
        ids = column.topk(room, largest=False, sorted=True).values  # ascending
        kept = ids < v
    else:
        ids = x.sort(dim=-1, descending=True, stable=True).indices[:, :room]
        kept = x.gather(-1, ids) > -INF
        if request.method == "topp":
            q = log_q.gather(-1, ids).exp()
            rank = torch.arange(room, device=x.device)
            kept = kept & ((q.cumsum(-1) - q < request.p) | (rank < request.least))
    ids = torch.where(kept, ids, 0)
    logprobs = torch.where(kept, log_q.gather(-1, ids), -INF)
    if request.sampled:
        mass = torch.where(kept, weights.gather(-1, ids), 0.0)
        log_q_kept = log_q_tau.gather(-1, ids)
        neg_entropy = torch.where(kept, mass * log_q_kept, 0.0).sum(-1)
    ids = torch.where(kept, ids, -1)
    ids = torch.where(bad, torch.arange(room, device=x.device), ids)
    padding = (0, most - room)
    nan = float("nan")

    def fp32(value: Tensor, bad: Tensor = bad[:, 0]) -> Tensor:
        return torch.where(bad, nan, value).float()

    def padded(value: Tensor, fill: float) -> Tensor:
        return fp32(torch.nn.functional.pad(value, padding, value=fill), bad)

    return Selected(
        ids=torch.nn.functional.pad(ids, padding, value=-1).int(),
        logprobs=padded(logprobs, -INF),
        lse=fp32(lse),
        k_eff=torch.where(bad[:, 0], room, kept.sum(-1)).int(),
        mass=None if mass is None else padded(mass, 0.0),
        neg_entropy=None if neg_entropy is None else fp32(neg_entropy),
    )


def empty(logits: Tensor, request: Request) -> Selected:
    """Tensors for a kernel to fill with the targets of logits (..., V)."""
    leading, device = logits.shape[:-1], logits.device

    def fresh(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Selected(
        ids=fresh((*leading, request.most), torch.int32),
        logprobs=fresh((*leading, request.most)),
        lse=fresh((len(request.temperatures), *leading)),
        k_eff=fresh(leading, torch.int32),
        mass=fresh((*leading, request.most)) if request.sampled else None,
        neg_entropy=fresh(leading) if request.sampled else None,
    )


def _columns_at(points: Tensor, cumulative: Tensor) -> Tensor:
    """The first column whose cumulative weight (n, V) passes each point (n, m); the last with weight at the end."""
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total)
    return torch.searchsorted(cumulative, points, right=True).clamp(max=last)


def _multinomial(q: Tensor, request: Request, tokens: Tensor) -> Tensor:
    """Number of draws of each column over k, (n, V)."""
    k = request.most
    draws = torch.arange(k, device=q.device)
    cumulative = q.cumsum(-1)
    points = uniforms(request.seed, tokens[:, None], draws) * cumulative[:, -1:]
    counts = torch.zeros_like(q).scatter_add_(-1, _columns_at(points, cumulative), torch.ones_like(points))
    return counts / k


def _pps(q: Tensor, request: Request, tokens: Tensor) -> Tensor:
    """The mass q / pi of the columns that are met, 0 elsewhere, (n, V)."""
    k, (n, v) = request.most, q.shape
    # With the m largest columns there for certain and R the mass of the rest, l = (k - m) / R; m is the first number
    # whose next column has l q < 1.
    descending = q.sort(-1, descending=True).values
    rest = descending.flip(-1).cumsum(-1).flip(-1)  # from column m of the order on
    rank = torch.arange(v, device=q.device)
    meets = (rank < k) & (descending > 0) & (descending * (k - rank) >= rest)
    m = meets.int().cumprod(-1).sum(-1, keepdim=True)
    threshold = torch.where(m > 0, descending.gather(-1, (m - 1).clamp(min=0)), INF)
    certain = q >= threshold
    left = k - certain.sum(-1, keepdim=True)
    cumulative = torch.where(certain, 0.0, q).cumsum(-1)
    step = cumulative[:, -1:] / left.clamp(min=1)  # 1 / l
    j = torch.arange(k, device=q.device)
    u = uniforms(request.seed, tokens[:, None], torch.zeros_like(j[:1]))
    met = _columns_at((u + j) * step, cumulative)
    used = (j < left) & (step > 0)
    drawn = torch.zeros((n, v + 1), dtype=torch.bool, device=q.device)  # the last column takes the points not used
    drawn.scatter_(-1, torch.where(used, met, v), value=True)
    return torch.where(certain, q, torch.where(drawn[:, :v], step, 0.0))


# --- Random numbers ---------------------------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF


def philox(counter: list[Tensor], key: list[int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): four words of counter, two of key, four words out.

    Words are int64 tensors below 2^32; their products wrap, which leaves the bits that are used as they should be.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def uniforms(seed: int, tokens: Tensor, draws: Tensor) -> Tensor:
    """Uniform in [0, 1) with 53 bits, fp64: a function of the seed, the token's number and the draw's, both int64."""
    tokens, draws = torch.broadcast_tensors(tokens, draws)
    words = philox([draws, tokens & _LOW, tokens >> 32, torch.zeros_like(draws)], [seed & _LOW, seed >> 32])
    return ((words[0] << 21) + (words[1] >> 11)).double() * 2.0**-53
