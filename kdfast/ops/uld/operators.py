"""Universal logit distillation, per token: operators and fakes.

With p = softmax(student / tau) and q = softmax(teacher / tau), both sorted descending and the shorter one padded with
probability 0, the loss of a token is L = sum_j |p_j - q_j|. Three facts make it cheap:

- softmax keeps the order, so each row of logits is sorted once and becomes probabilities afterwards;
- with s_j = sign(p_j - q_j) at the rank of column j, dL/dz_j = p_j (s_j - sum_i s_i p_i) / tau. All that the sort
  leaves for backward is s: one byte per logit, where autograd would keep the sorted rows and their int64 permutations;
- tokens do not depend on one another, so sorts and temporaries exist for a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdfast.ops.uld.sort import sort_rows

#: Elements of one chunk's rows: some 40 MB of temporaries on a CPU (fewer rows cost more in threads that wait for one
#: another than caches save), enough rows to fill a GPU elsewhere.
CHUNK = {"cpu": 1 << 20}
CHUNK_ELSEWHERE = 1 << 24

# student (..., V) and teacher (..., U) floating point; temperature 0-d; counted (...) bool. loss (...), signs (..., V)
# int8, stats (..., 3) = max of the logits, sum exp((z - max) / tau), sum s p; dtau (...) = d loss / d tau. What is not
# asked for has no elements.
_library = torch.library.Library("kdfast", "FRAGMENT")
_library.define(
    "uld_forward(Tensor student, Tensor teacher, Tensor temperature, Tensor? counted, bool signed, bool wants_dtau) "
    "-> (Tensor loss, Tensor signs, Tensor stats, Tensor dtau)"
)
_library.define(
    "uld_backward(Tensor student, Tensor temperature, Tensor? counted, Tensor signs, Tensor stats, Tensor upstream) "
    "-> Tensor"
)


forward, backward = torch.ops.kdfast.uld_forward, torch.ops.kdfast.uld_backward


def _forward(
    student: Tensor, teacher: Tensor, temperature: Tensor, counted: Tensor | None, signed: bool, wants_dtau: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake_forward(student, teacher, temperature, counted, signed, wants_dtau)
    v, u = student.shape[-1], teacher.shape[-1]
    loss, dtau = outputs[0].view(-1), outputs[3].view(-1)
    signs, stats = (x.view(loss.shape[0], x.shape[-1]) for x in outputs[1:3])
    tau = temperature.to(dtype=loss.dtype, device=loss.device)
    for rows in _chunks(loss.shape[0], max(v, u), student.device):
        z, order = sort_rows(_rows(student, rows, counted, loss.dtype), ordered=signed)
        t, _ = sort_rows(_rows(teacher, rows, counted, loss.dtype), ordered=False)
        top = z[:, :1].clone()
        p, total = _softmax(z, tau)
        q, _ = _softmax(t, tau)
        gap = pad(p, (0, max(u - v, 0))) - pad(q, (0, max(v - u, 0)))
        s = gap.sign()
        loss[rows] = gap.abs_().sum(-1)
        # A NaN of the teacher, too, must come out: the sign of NaN is 0.
        centre = (s[:, :v] * p).sum(-1) + 0 * loss[rows]
        stats[rows] = torch.cat([top, total, centre[:, None]], -1)
        if signed:
            signs[rows].scatter_(-1, order, s[:, :v].to(torch.int8))
        if wants_dtau:
            dtau[rows] = (_dtau(q, t, s[:, :u]) - _dtau(p, z, s[:, :v])) / tau
    return outputs


def _fake_forward(
    student: Tensor, teacher: Tensor, temperature: Tensor, counted: Tensor | None, signed: bool, wants_dtau: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leading = student.shape[:-1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=student.device)

    signs = empty((*leading, student.shape[-1] if signed else 0), torch.int8)
    return empty(leading, dtype), signs, empty((*leading, 3), dtype), empty(leading if wants_dtau else (0,), dtype)


def _backward(
    student: Tensor, temperature: Tensor, counted: Tensor | None, signs: Tensor, stats: Tensor, upstream: Tensor
) -> Tensor:
    v = student.shape[-1]
    tau = temperature.to(dtype=stats.dtype, device=stats.device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    flat, signs, stats, factor = grad.view(-1, v), signs.view(-1, v), stats.view(-1, 3), (upstream / tau).reshape(-1, 1)
    for rows in _chunks(flat.shape[0], v, student.device):
        top, total, centre = stats[rows].split(1, -1)
        p = (_rows(student, rows, counted, stats.dtype) - top).div_(tau).exp_()
        g = p.mul_(signs[rows] - centre).mul_(factor[rows] / total)
        flat[rows] = g if counted is None else torch.where(counted.reshape(-1, 1)[rows], g, 0.0)
    return grad


_library.impl("uld_forward", _forward, "CompositeExplicitAutograd")
_library.impl("uld_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("kdfast::uld_forward", _fake_forward)
torch.library.register_fake("kdfast::uld_backward", lambda student, *_: student.new_empty(student.shape))


def _chunks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of [0, n): as many rows as a chunk holds, and one for each thread at least."""
    step = max(CHUNK.get(device.type, CHUNK_ELSEWHERE) // width, torch.get_num_threads())
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _rows(x: Tensor, rows: slice, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Some rows of (..., V) as (n, V), copied alone where the axes do not merge; 0 in those of dropped tokens."""
    if x.is_contiguous():
        part = x.view(-1, x.shape[-1])[rows]
    else:
        part = x[torch.unravel_index(torch.arange(rows.start, rows.stop, device=x.device), x.shape[:-1])]
    part = part.to(dtype)
    return part if counted is None else torch.where(counted.reshape(-1, 1)[rows], part, 0.0)


def _softmax(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows that are sorted descending, and sum(exp((x - max) / tau)); x becomes (x - max) / tau."""
    x.sub_(x[:, :1].clone()).div_(tau)
    e = x.exp()
    total = e.sum(-1, keepdim=True)
    return e.div_(total), total


def _dtau(p: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """sum_j x_j p_j (s_j - sum_i s_i p_i), with x the logits over tau: minus tau times d(sum s p) / d tau."""
    present = p > 0
    return torch.where(present, x * p * (s - (s * p).sum(-1, keepdim=True)), 0.0).sum(-1)
