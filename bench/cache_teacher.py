"""The teachers whose soft targets the cache is measured with.

``synthetic``: Zipf-like. Sorted by probability, column r of a token has probability proportional to (r + 1)^-a e^n,
with a uniform in [1.0, 1.7] for the token, and n normal with deviation 0.3 for the columns that are kept. Their ids are
drawn without repetition by the law of Zipf and Mandelbrot, with probability proportional to 1 / (id + 2.7), as if a
tokenizer numbered what is frequent first, and independently of each other: an entropy coder has nothing but frequencies
to learn, and a language model leaves it more. Such ids have an order-0 entropy of 13.0 bits. ``exponent=CALIBRATED``
draws them in proportion to (id + 2.7)^-1.11, which brings it to about 11.9 bits, the figure that the cache's prototype
was designed with; ``id_entropy`` says what it is.
Only what is kept is made; the tail's mass and its normaliser at each temperature are sums of the power law.
``synthetic_logits`` makes all columns, for methods that draw.

``demo``: the logits of the demonstration's teacher (V = 4096) on its held-out text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from kdfast import SparseTargets, soft_targets

VOCAB = 128256
TEMPERATURES = (1.0, 2.0)
NOISE = 0.3
OFFSET = 2.7  # Mandelbrot's, for English words
CALIBRATED = 1.11  # exponent of the ids' law


def synthetic(samples: int, tokens: int, k: int, seed: int = 0, exponent: float = 1.0) -> list[SparseTargets]:
    """Top-k targets of ``samples`` sequences."""
    rng = np.random.default_rng(seed)
    unigram = np.cumsum((np.arange(VOCAB) + OFFSET) ** -exponent)
    unigram /= unigram[-1]
    return [_synthetic(rng, unigram, tokens, k) for _ in range(samples)]


def _synthetic(rng: np.random.Generator, unigram: np.ndarray, tokens: int, k: int) -> SparseTargets:
    exponent = rng.uniform(1.0, 1.7, (tokens, 1))
    head = -exponent * np.log(np.arange(1, k + 1)) + NOISE * rng.standard_normal((tokens, k))
    head = -np.sort(-head, axis=1)
    tails = {t: _log_tail(exponent[:, 0] / t, k) for t in TEMPERATURES}

    def log_z(t: float) -> np.ndarray:
        return np.logaddexp(np.logaddexp.reduce(head / t, axis=1), tails[t])

    logprobs = head - log_z(1.0)[:, None]
    lse = {t: log_z(t) - log_z(1.0) / t for t in TEMPERATURES}
    return SparseTargets(
        torch.from_numpy(_distinct(rng, unigram, tokens, k)),
        torch.from_numpy(logprobs.astype(np.float32)),
        vocab_size=VOCAB,
        lse={t: torch.from_numpy(x.astype(np.float32)) for t, x in lse.items()},
    )


def id_entropy(targets: Sequence[SparseTargets]) -> float:
    """Order-0 entropy of the ids that are kept, in bits, by how often each occurs."""
    ids = np.concatenate([t.ids[t.valid].numpy() for t in targets])
    share = np.unique(ids, return_counts=True)[1] / len(ids)
    return float(-(share * np.log2(share)).sum())


def synthetic_logits(tokens: int, seed: int = 0, exponent: float = 1.0) -> torch.Tensor:
    """(tokens, V) fp32, without the noise."""
    rng = np.random.default_rng(seed)
    log_weight = -exponent * np.log(np.arange(VOCAB) + OFFSET)
    out = np.empty((tokens, VOCAB), np.float32)
    for row in out:
        # Ordered by log-weight plus Gumbel noise, ids come as if they were drawn one by one.
        order = np.argsort(-(log_weight + rng.gumbel(size=VOCAB)))
        row[order] = -rng.uniform(1.0, 1.7) * np.log(np.arange(1, VOCAB + 1))
    return torch.from_numpy(out)


@functools.cache
def _tail_table(k: int) -> tuple[np.ndarray, np.ndarray]:
    exponents = np.linspace(0.4, 1.8, 141)
    ranks = np.log(np.arange(k + 1, VOCAB + 1))
    return exponents, np.array([np.logaddexp.reduce(-a * ranks) for a in exponents])


def _log_tail(exponent: np.ndarray, k: int) -> np.ndarray:
    """Log of the sum of r^-a over the ranks that are not kept."""
    return np.interp(exponent, *_tail_table(k))


def _distinct(rng: np.random.Generator, unigram: np.ndarray, tokens: int, k: int) -> np.ndarray:
    """Ids (tokens, k) int32, none twice in a row: more than enough draws, of which the first of each id count."""
    draws = np.searchsorted(unigram, rng.random((tokens, 2 * k)))
    out = np.empty((tokens, k), np.int32)
    for i, row in enumerate(draws):
        _, first = np.unique(row, return_index=True)
        chosen = row[np.sort(first)][:k]
        missing = k - len(chosen)
        if missing:  # rare: any ids that are not there
            chosen = np.concatenate([chosen, np.setdiff1d(np.arange(VOCAB), chosen)[:missing]])
        out[i] = chosen
    return out


def demo(samples: int, k: int, temperatures: Sequence[float] = TEMPERATURES, **options: object) -> list[SparseTargets]:
    """Targets of the demonstration's teacher on held-out text, 256 tokens a sample."""
    from kdfast.demo.corpus import load_corpus
    from kdfast.demo.data import sequences
    from kdfast.demo.teacher import load_teacher
    from kdfast.demo.tokenizer import encode

    teacher, tokenizer, _ = load_teacher()
    ids = sequences(encode(tokenizer, load_corpus().held_out), 256, samples)[:, :-1]
    with torch.no_grad():
        return [soft_targets(teacher(row[None])[0], k=k, temperatures=temperatures, **options) for row in ids]


def divergence(given: SparseTargets, stored: SparseTargets, temperature: float) -> torch.Tensor:
    """KL(given || stored) of each token in nats, kept entries one by one and the tail as one, fp64."""
    q = given.logprobs.double() / temperature - given.lse[temperature].double()[:, None]
    order = given.ids.argsort(-1), stored.ids.argsort(-1)
    p = stored.logprobs.double() / temperature - stored.lse[temperature].double()[:, None]
    q, p = q.gather(-1, order[0]), p.gather(-1, order[1])
    tails = [(-torch.expm1(torch.logsumexp(x, -1))).clamp(min=1e-300) for x in (q, p)]
    return (q.exp() * (q - p)).sum(-1) + tails[0] * (tails[0].log() - tails[1].log())
