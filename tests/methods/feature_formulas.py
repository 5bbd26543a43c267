"""The feature losses written a second time, in numpy and loops, from their papers; and the cases that are compared.

A formula is a function of (loss, student, teacher, mask): the loss for what it has learned, the layers by pattern as
lists of fp64 arrays, the mask (B, S) or None. It returns the value of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from kdfast.methods.feature import FSP, NST, VID, AttentionMaps, AttentionTransfer, FitNet, MiniLM, MiniLMv2, TinyBERT

B, S = 3, 5


class Case(NamedTuple):
    """A loss, the shapes of the layers it sees, its formula, and whether it is 0 for equal layers."""

    make: Callable[[], Any]
    student: dict[str, list[tuple[int, ...]]]
    teacher: dict[str, list[tuple[int, ...]]]
    formula: Callable[..., float]
    zero: bool = False
    tokens: bool = False


def array(parameter):
    return parameter.detach().double().cpu().numpy()


def shrink(x, height, width):
    """Averages of (C, H, W) over the windows floor(i H / h) to ceil((i + 1) H / h)."""
    c, high, wide = x.shape
    out = np.zeros((c, height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * high // height, -(-(i + 1) * high // height))
            columns = slice(j * wide // width, -(-(j + 1) * wide // width))
            out[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return out


def meet(a, b):
    size = (min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2]))
    return shrink(a, *size), shrink(b, *size)


def rows(x, y, mask):
    """The vectors of one position each: of both layers, those of an example together; padding left out."""
    for i in range(len(x)):
        if x[i].ndim == 1:
            yield x[i], y[i]
        elif x[i].ndim == 2:
            for n in range(len(x[i])):
                if mask is None or mask[i, n]:
                    yield x[i][n], y[i][n]
        else:
            a, b = meet(x[i], y[i])
            for h in range(a.shape[1]):
                for w in range(a.shape[2]):
                    yield a[:, h, w], b[:, h, w]


def linear(module, x):
    weight = array(module.weight).reshape(module.weight.shape[0], -1)
    return weight @ x + (0 if module.bias is None else array(module.bias))


def projected_squares(project, x, y, mask):
    return np.mean([np.mean((project(a) - b) ** 2) for a, b in rows(x, y, mask)])


def fitnet(pairs):
    def formula(loss, student, teacher, mask):
        (name,), (other,) = student, teacher
        total = 0.0
        for k, (i, j) in enumerate(pairs):
            project = loss.projectors[k]
            learned = (lambda x, p=project: linear(p, x)) if hasattr(project, "weight") else lambda x: x
            total += projected_squares(learned, student[name][i], teacher[other][j], mask)
        return total

    return formula


def vid(loss, student, teacher, mask):
    first, _, second, _, third = loss.means[0]
    variance = np.log1p(np.exp(array(loss.scales[0]))) + loss.eps
    found = []
    for a, b in rows(student["s"][0], teacher["t"][0], mask):
        mu = linear(third, np.maximum(linear(second, np.maximum(linear(first, a), 0)), 0))
        found.append(np.mean([((m - y) ** 2 / v + np.log(v)) / 2 for m, y, v in zip(mu, b, variance, strict=True)]))
    return np.mean(found)


def attention_map(x):
    flat = sum(channel**2 for channel in x) / len(x)
    return flat.ravel() / np.sqrt((flat**2).sum())


def attention_transfer(paper):
    def formula(loss, student, teacher, mask):
        found = []
        for x, y in zip(student["s"][0], teacher["t"][0], strict=True):
            a, b = (attention_map(maps) for maps in meet(x, y))
            found.append(np.sqrt(((a - b) ** 2).sum()) / 2 if paper else ((a - b) ** 2).sum() / a.size)
        return np.mean(found)

    return formula


def nst(loss, student, teacher, mask):
    def kernel(p, q):
        return np.mean([(u @ v) ** 2 for u in p for v in q])

    found = []
    for x, y in zip(student["s"][0], teacher["t"][0], strict=True):
        s, t = ([c.ravel() / np.sqrt((c**2).sum()) for c in maps] for maps in meet(x, y))
        found.append(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t))
    return np.mean(found)


def flow(x, y):
    a, b = meet(x, y)
    positions = [(h, w) for h in range(a.shape[1]) for w in range(a.shape[2])]
    return sum(np.outer(a[:, h, w], b[:, h, w]) for h, w in positions) / len(positions)


def fsp(loss, student, teacher, mask):
    found = []
    for i in range(B):
        s = flow(student["s1"][0][i], student["s2"][0][i])
        t = flow(teacher["t1"][0][i], teacher["t2"][0][i])
        found.append(((t - s) ** 2).sum())
    return np.mean(found)


# --- Attention --------------------------------------------------------------------------------------------------------


def head(x, k, heads):
    size = x.shape[1] // heads
    return x[:, k * size : (k + 1) * size]


def there(mask, i, length):
    return [n for n in range(length) if mask is None or mask[i, n]]


def score(q, k):
    return q @ k / np.sqrt(len(q))


def score_squares(sq, sk, tq, tk, heads, mask, causal=False):
    found = []
    for i in range(len(sq)):
        tokens = there(mask, i, len(sq[i]))
        for h in range(heads):
            parts = [head(x[i], h, heads) for x in (sq, sk, tq, tk)]
            for m in tokens:
                for n in tokens:
                    if n <= m or not causal:
                        found.append((score(parts[0][m], parts[1][n]) - score(parts[2][m], parts[3][n])) ** 2)
    return np.mean(found)


def score_maps(causal):
    def formula(loss, student, teacher, mask):
        (sq, sk), (tq, tk) = student.values(), teacher.values()
        return score_squares(sq[0], sk[0], tq[0], tk[0], loss.heads, mask, causal)

    return formula


def maps(pairs):
    def formula(loss, student, teacher, mask):
        total = 0.0
        for i, j in pairs:
            found = []
            for b in range(B):
                tokens = there(mask, b, S)
                inside = np.ix_(range(2), tokens, tokens)
                found.extend((student[":a.*"][i][b][inside] - teacher[":b.*"][j][b][inside]).ravel() ** 2)
            total += np.mean(found)
        return total

    return formula


def tinybert(loss, student, teacher, mask):
    hs, ht = student["h.*"], teacher["h.*"]
    total = projected_squares(lambda x: array(loss.embeddings.weight) @ x, hs[0], ht[0], mask)
    for m in (1, 2):
        total += projected_squares(lambda x: array(loss.hidden.weight) @ x, hs[m], ht[2 * m], mask)
        own, others = m - 1, 2 * m - 1
        layers = (student["q.*"][own], student["k.*"][own], teacher["q.*"][others], teacher["k.*"][others])
        total += score_squares(*layers, 2, mask)
    return total


def relation_divergence(sa, sb, ta, tb, heads, mask, causal):
    """Mean over heads and queries of KL(teacher, student), rows over the keys that are seen."""
    found = []
    for i in range(len(sa)):
        tokens = there(mask, i, len(sa[i]))
        for h in range(heads):
            parts = [head(x[i], h, heads) for x in (sa, sb, ta, tb)]
            for m in tokens:
                keys = [n for n in tokens if n <= m or not causal]
                s = log_softmax([score(parts[0][m], parts[1][n]) for n in keys])
                t = log_softmax([score(parts[2][m], parts[3][n]) for n in keys])
                found.append((np.exp(t) * (t - s)).sum())
    return np.mean(found)


def thirds(layers):
    """Queries, keys and values, (S, H) each by example."""
    if len(layers) == 3:
        return [found[0] for found in layers.values()]
    (fused,) = layers.values()
    return np.split(np.asarray(fused[0]), 3, axis=2)


def minilm(loss, student, teacher, mask):
    (sq, sk, sv), (tq, tk, tv) = thirds(student), thirds(teacher)
    of = (2, mask, loss.causal)
    return relation_divergence(sq, sk, tq, tk, *of) + relation_divergence(sv, sv, tv, tv, *of)


def minilm_v2(loss, student, teacher, mask):
    both = zip(thirds(student), thirds(teacher), strict=True)
    return sum(relation_divergence(s, s, t, t, 4, mask, loss.causal) for s, t in both)


def one(name, *shape):
    return {name: [(B, *shape)]}


def qkv(width):
    return {f"a.{name}": [(B, S, width)] for name in ("query", "key", "value")}


QKV = "a.{query,key,value}"
CASES = {
    "fitnet-features": Case(lambda: FitNet("s", "t"), one("s", 4), one("t", 6), fitnet([(0, 0)])),
    "fitnet-tokens": Case(lambda: FitNet("s", "t"), one("s", S, 4), one("t", S, 6), fitnet([(0, 0)]), tokens=True),
    "fitnet-maps": Case(lambda: FitNet("s", "t"), one("s", 4, 5, 6), one("t", 3, 3, 2), fitnet([(0, 0)])),
    "fitnet-crossed": Case(lambda: FitNet("s", "t"), one("s", 4, 5, 2), one("t", 3, 3, 7), fitnet([(0, 0)])),
    "fitnet-identity": Case(
        lambda: FitNet("s", "t", identity=True), one("s", S, 4), one("t", S, 4), fitnet([(0, 0)]), True, True
    ),
    "fitnet-uniform": Case(
        lambda: FitNet("s.*", "t.*"),
        {"s.*": [(B, S, 4)] * 2},
        {"t.*": [(B, S, 3)] * 6},
        fitnet([(0, 2), (1, 5)]),
        tokens=True,
    ),
    "fitnet-hidden-states": Case(
        lambda: FitNet(":hidden_states.*", ":hidden_states.*"),
        {":hidden_states.*": [(B, S, 4)] * 3},
        {":hidden_states.*": [(B, S, 3)] * 9},
        fitnet([(0, 0), (1, 4), (2, 8)]),
        tokens=True,
    ),
    "vid-features": Case(lambda: VID("s", "t"), one("s", 4), one("t", 3), vid),
    "vid-tokens": Case(lambda: VID("s", "t", variance=0.5), one("s", S, 4), one("t", S, 3), vid, tokens=True),
    "vid-maps": Case(lambda: VID("s", "t", variance=2.0), one("s", 4, 6, 6), one("t", 3, 4, 4), vid),
    "attention-transfer": Case(
        lambda: AttentionTransfer("s", "t"), one("s", 4, 3, 4), one("t", 4, 3, 4), attention_transfer(False), True
    ),
    "attention-transfer-paper": Case(
        lambda: AttentionTransfer("s", "t", mode="paper"),
        one("s", 4, 3, 4),
        one("t", 4, 3, 4),
        attention_transfer(True),
        True,
    ),
    "attention-transfer-sizes": Case(
        lambda: AttentionTransfer("s", "t"), one("s", 4, 3, 4), one("t", 5, 7, 4), attention_transfer(False)
    ),
    "nst-positions": Case(lambda: NST("s", "t"), one("s", 6, 2, 3), one("t", 6, 2, 3), nst, True),
    "nst-channels": Case(lambda: NST("s", "t"), one("s", 2, 5, 4), one("t", 2, 5, 4), nst, True),
    "nst-sizes": Case(lambda: NST("s", "t"), one("s", 2, 6, 4), one("t", 5, 3, 4), nst),
    "fsp": Case(
        lambda: FSP("{s1,s2}", ("t1", "t2")),
        {"s1": [(B, 2, 6, 6)], "s2": [(B, 3, 3, 3)]},
        {"t1": [(B, 2, 4, 4)], "t2": [(B, 3, 4, 4)]},
        fsp,
    ),
    "attention-scores": Case(
        lambda: AttentionMaps("s.{q,k}", "t.{q,k}", heads=2),
        {"s.q": [(B, S, 4)], "s.k": [(B, S, 4)]},
        {"t.q": [(B, S, 6)], "t.k": [(B, S, 6)]},
        score_maps(False),
        tokens=True,
    ),
    "attention-scores-causal": Case(
        lambda: AttentionMaps("s.{q,k}", "s.{q,k}", heads=2, causal=True),
        {"s.q": [(B, S, 4)], "s.k": [(B, S, 4)]},
        {"s.q": [(B, S, 4)], "s.k": [(B, S, 4)]},
        score_maps(True),
        True,
        True,
    ),
    "attention-maps": Case(
        lambda: AttentionMaps(":a.*", ":b.*", layer_map="last"),
        {":a.*": [(B, 2, S, S)] * 2},
        {":b.*": [(B, 2, S, S)] * 3},
        maps([(0, 1), (1, 2)]),
        tokens=True,
    ),
    "tinybert": Case(
        lambda: TinyBERT("h.*", "h.*", student_attention="{q.*,k.*}", teacher_attention="{q.*,k.*}", heads=2),
        {"h.*": [(B, S, 4)] * 3, "q.*": [(B, S, 4)] * 2, "k.*": [(B, S, 4)] * 2},
        {"h.*": [(B, S, 6)] * 5, "q.*": [(B, S, 6)] * 4, "k.*": [(B, S, 6)] * 4},
        tinybert,
        tokens=True,
    ),
    "minilm": Case(lambda: MiniLM(QKV, QKV, heads=2), qkv(4), qkv(6), minilm, tokens=True),
    "minilm-causal": Case(lambda: MiniLM(QKV, QKV, heads=2, causal=True), qkv(4), qkv(4), minilm, True, True),
    "minilm-fused": Case(lambda: MiniLM("c", QKV, heads=2), one("c", S, 12), qkv(6), minilm, tokens=True),
    "minilm-v2": Case(lambda: MiniLMv2(QKV, QKV, relation_heads=4), qkv(8), qkv(12), minilm_v2, tokens=True),
    "minilm-v2-causal": Case(
        lambda: MiniLMv2("c", "c", relation_heads=4, causal=True),
        one("c", S, 24),
        one("c", S, 24),
        minilm_v2,
        True,
        True,
    ),
}
