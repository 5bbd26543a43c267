"""The relation losses in fp64, by loops over samples, written from the papers."""

import math

import numpy as np


def smooth_l1(u):
    return u * u / 2 if abs(u) < 1 else abs(u) - 0.5


def rkd_distance(student, teacher):
    def normalised(x):
        n = len(x)
        d = {(i, j): math.dist(x[i], x[j]) for i in range(n) for j in range(n)}
        mean = sum(d[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return {pair: distance / mean if mean else 0.0 for pair, distance in d.items()}

    s, t = normalised(student), normalised(teacher)
    return sum(smooth_l1(s[pair] - t[pair]) for pair in s) / len(student) ** 2


def rkd_angle(student, teacher):
    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        lengths = math.hypot(*a) * math.hypot(*b)
        return float(a @ b) / lengths if lengths else 0.0

    n = range(len(student))
    terms = [smooth_l1(cosine(student, i, j, k) - cosine(teacher, i, j, k)) for i in n for j in n for k in n]
    return sum(terms) / len(terms)


def rkd(student, teacher):
    return rkd_distance(student, teacher) + 2 * rkd_angle(student, teacher)


def sp(student, teacher):
    def similarities(x):
        g = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in x] for p in x]
        return [[v / (math.hypot(*row) or 1.0) for v in row] for row in g]

    s, t = similarities(student), similarities(teacher)
    n = len(student)
    return sum((s[i][j] - t[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


def _cosine(p, q):
    lengths = math.hypot(*p) * math.hypot(*q)
    return float(p @ q) / lengths if lengths else 0.0


def pkt(student, teacher):
    def neighbours(x):
        k = [[(1 + _cosine(p, q)) / 2 for q in x] for p in x]
        return [[v / sum(row) for v in row] for row in k]

    s, t = neighbours(student), neighbours(teacher)
    n = len(student)
    terms = [t[i][j] * math.log((t[i][j] + 1e-7) / (s[i][j] + 1e-7)) for i in range(n) for j in range(n)]
    return sum(terms) / n**2


def cc(student, teacher, gamma=0.4, order=2):
    def kernel(p, q):
        powers = range(order + 1)
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** k / math.factorial(k) * _cosine(p, q) ** k for k in powers)

    n = range(len(student))
    terms = [(kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2 for i in n for j in n]
    return sum(terms) / len(terms)


def crd_side(anchors, memory, positions, temperature, z=None):
    """One side's value and Z: NCE as in equations 17 and 18 of the paper, positions (B, 1 + K), the positive first."""
    n, noise = len(memory), (positions.shape[1] - 1) / len(memory)
    raw = np.array(
        [[math.exp(a @ memory[k] / temperature) for k in p] for a, p in zip(anchors, positions, strict=True)]
    )
    z = raw.mean() * n if z is None else z
    h = raw / z / (raw / z + noise)
    return -(np.log(h[:, 0]).sum() + np.log1p(-h[:, 1:]).sum()) / len(anchors), z
