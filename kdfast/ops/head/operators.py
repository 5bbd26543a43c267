"""The loss over logits that are made and consumed a chunk of tokens at a time, so that they never exist as a whole.

Of each chunk: a matrix product per head gives its logits, the dense kernel puts their gradient in their place, and two
more products take that on to the hidden states and the weight. Scale and softcap are the kernel's, in fp32: it reads
products as logits, and leaves the gradient of the products. With a student and a teacher head a step is the four
products of the eager loss; beside the gradients it returns, it holds one chunk of logits and the weight's gradient in
fp32.

``head_fused`` returns per-token terms and finished gradients, ``head_forward`` the terms alone. A backward that learns
its upstream gradients late (per-token losses, fp16) is ``head_fused`` with those as coefficients.

On the CPU, tokens that do not count leave before the products. On a GPU their number is not known to the host, and
waiting for it would stop the queue: there they go through the products, and the kernel skips them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.dense import operators as dense
from kdfast.ops.dense.inputs import INPUTS, N_INPUTS, Inputs, Wants
from kdfast.ops.dense.operators import COEFFICIENTS, OBSERVES, absent, wants_of
from kdfast.spec.head import Cap
from kdfast.views import contiguous_rows

#: Bytes of logits in one chunk, all heads together: enough rows for the matrix products to run at full speed.
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}

#: Whether torch multiplies 16-bit matrices into fp32 on a GPU; if not, a chunk's product is rounded, then added.
PRODUCTS_ADD_IN_FP32 = hasattr(torch.ops.aten.addmm, "dtype_out") and torch.version.hip is None

# What makes logits of `student` and `teachers`, by participant, the student first: without a weight, a participant's
# tensor holds its logits, with one its hidden states. `lows` (..., R) and `ups` (V, R) are of a low-rank product that
# is added. A softcap of 0 is none.
_HEADS = (
    "Tensor?[] head_weights, Tensor?[] head_biases, Tensor?[] lows, Tensor?[] ups, float[] softcaps, float[] scales, "
    "int memory_budget"
)

_library = torch.library.Library("kdfast", "FRAGMENT")
_library.define(
    f"head_forward(Tensor student, {INPUTS}, {_HEADS}, bool wants_z, bool wants_dtau, {OBSERVES}) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor observed)"
)
_library.define(
    f"head_fused(Tensor student, {INPUTS}, {_HEADS}, bool wants_z, bool wants_dtau, {COEFFICIENTS}, bool[] wanted, "
    f"{OBSERVES}) -> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor d_student, Tensor d_weight, "
    "Tensor d_bias, Tensor d_low, Tensor d_up, Tensor observed)"
)


forward, fused = torch.ops.kdfast.head_forward, torch.ops.kdfast.head_fused


class Heads(NamedTuple):
    """The arguments in ``_HEADS``, in order."""

    weights: list[Tensor | None]
    biases: list[Tensor | None]
    lows: list[Tensor | None]
    ups: list[Tensor | None]
    softcaps: list[float]
    scales: list[float]
    memory_budget: int

    def columns(self, k: int, x: Tensor) -> int:
        """Width of participant k's logits."""
        weight = self.weights[k]
        return x.shape[-1] if weight is None else weight.shape[0]


N_HEADS = len(Heads._fields)
N_PARTS = 5  # of a participant: its tensor, weight, bias, low and up


def chunk_rows(tokens: int, bytes_per_token: int, budget: int) -> int:
    """Tokens of one chunk, such that chunks are about equal: a function of sizes, never of free memory."""
    chunks = -(-tokens // max(1, budget // bytes_per_token))
    return -(-tokens // max(1, chunks))


def token_rows(x: Tensor, tokens: slice) -> Tensor:
    """Rows of (..., n) for tokens counted in one line: a view where memory allows one."""
    try:
        return x.view(-1, x.shape[-1])[tokens]
    except RuntimeError:  # such as logits[:, :-1]: its rows do not lie in one line
        return x[torch.unravel_index(torch.arange(tokens.start, tokens.stop, device=x.device), x.shape[:-1])]


def _knows_counts(counted: Tensor) -> bool:
    """Whether the number of tokens that count can be had without waiting for a device."""
    return counted.device.type == "cpu"


class Chunks:
    """One call: its tokens in one line, less those that leave, and the logits of a range of them.

    ``columns`` of each participant, where a chunk's size must not go by those that are here.
    """

    def __init__(self, student: Tensor, inputs: Inputs, heads: Heads, *, columns: int | None = None) -> None:
        caps = tuple(Cap(*cap) for cap in zip(heads.scales, heads.softcaps, strict=True))
        self.heads, self.inputs, self.leading = heads, inputs._replace(caps=caps), student.shape[:-1]
        self.participants = [x.detach() for x in (student, *inputs.teachers)]
        self.lows = [None if x is None else x.detach() for x in heads.lows]
        counted = None if inputs.counted is None else inputs.counted.reshape(-1)
        self.index: Tensor | None = None  # of the tokens that stay, where some leave
        self.count = student.numel() // max(1, student.shape[-1])
        if counted is not None and _knows_counts(counted):
            staying, counted = counted.nonzero().squeeze(1), None
            if staying.numel() < self.count:
                self.index, self.count = staying, staying.numel()
        self.counted = counted  # where the host does not know how many
        self.labels = None if inputs.labels is None else self.compact(inputs.labels)
        self.teacher_weights = inputs.teacher_weights
        if self.teacher_weights is not None and self.teacher_weights.dim() > 1:
            self.teacher_weights = torch.stack([self.compact(w) for w in self.teacher_weights])
        self.kept = {
            name: self.compact(x, x.dim() - len(self.leading))
            for name in ("kept_ids", "kept_values", "kept_per_row")
            if (x := getattr(inputs, name)) is not None
        }
        made = [(k, x) for k, x in enumerate(self.participants) if heads.weights[k] is not None]
        per_token = sum((columns or heads.columns(k, x)) * x.element_size() for k, x in made)
        budget = heads.memory_budget or CHUNK_BYTES.get(student.device.type, CHUNK_BYTES["cuda"])
        self.rows = chunk_rows(self.count, per_token, budget)
        self.buffers = {
            k: torch.empty(min(self.rows, self.count), heads.columns(k, x), dtype=x.dtype, device=x.device)
            for k, x in made
        }

    def __iter__(self) -> Iterator[slice]:
        return (slice(a, min(a + self.rows, self.count)) for a in range(0, self.count, max(1, self.rows)))

    def compact(self, x: Tensor, own_axes: int = 0) -> Tensor:
        """A tensor per token, (..., own axes), as (count, own axes)."""
        flat = x.reshape(-1, *x.shape[x.dim() - own_axes :])
        return flat if self.index is None else flat[self.index]

    def spread(self, x: Tensor) -> Tensor:
        """(count, ...) back to all tokens, 0 where they left."""
        if self.index is not None:
            x = x.new_zeros(self.leading.numel(), *x.shape[1:]).index_copy_(0, self.index, x)
        return x.reshape((*self.leading, *x.shape[1:]))

    def given(self, k: int, tokens: slice) -> Tensor:
        """Participant k's tensor for these tokens, (n, columns or H): a view where memory allows one."""
        return self._given(self.participants[k], tokens, of_head=self.heads.weights[k] is not None)

    def low(self, k: int, tokens: slice) -> Tensor | None:
        """The (n, R) of participant k's low-rank product, likewise."""
        x = self.lows[k]
        return None if x is None else self._given(x, tokens, of_head=True)

    def _given(self, x: Tensor, tokens: slice, *, of_head: bool) -> Tensor:
        if self.index is not None:
            return x[torch.unravel_index(self.index[tokens], self.leading)]
        x = token_rows(x, tokens)
        if self.counted is not None and of_head:
            # a NaN in a token that does not count would reach the weight's gradient as 0 * NaN
            x = x.masked_fill(~self.counted[tokens, None], 0.0)
        return x

    def logits(self, k: int, tokens: slice) -> Tensor:
        """Participant k's logits, (n, columns); of a head, the product that they follow from."""
        x, weight, bias = self.given(k, tokens), self.heads.weights[k], self.heads.biases[k]
        if weight is None:
            return contiguous_rows(x)
        out, columns = self.buffers[k][: x.shape[0]], weight.detach().t()
        if bias is not None:
            torch.addmm(bias.detach(), x, columns, out=out)
        else:
            torch.mm(x, columns, out=out)
        low, up = self.low(k, tokens), self.heads.ups[k]
        if low is not None and up is not None:
            out.addmm_(low, up.detach().t())
        return out

    def inputs_of(self, tokens: slice) -> Inputs:
        """The dense kernel's arguments for these tokens."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[..., tokens]

        weights = self.teacher_weights
        return self.inputs._replace(
            teachers=[self.logits(k + 1, tokens) for k in range(len(self.inputs.teachers))],
            teacher_weights=weights if weights is None or weights.dim() == 1 else part(weights),
            labels=part(self.labels),
            counted=part(self.counted),
            kept_ids=self.kept["kept_ids"][tokens] if self.kept else None,
            kept_values=self.kept["kept_values"][tokens] if self.kept else None,
            kept_per_row=self.kept["kept_per_row"][tokens] if "kept_per_row" in self.kept else None,
        )

    def token_outputs(self, wants: Wants) -> dict[str, Tensor]:
        """Memory for what is wanted of the tokens that stay."""
        flat = torch.empty(self.count, 1, device=self.participants[0].device)
        return dense.token_outputs(flat, self.inputs, wants)


def finished(chunks: Chunks, out: dict[str, Tensor], *gradients: Tensor) -> tuple[Tensor, ...]:
    """Outputs in the order of the schemas: of all tokens, (...), from those of the tokens that stayed."""
    *terms, observed = (x if absent(x) else chunks.spread(x) for x in out.values())
    return *terms, *gradients, observed


def _parts(out: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    return {name: x[tokens] for name, x in out.items() if not absent(x)}


def _head_forward(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, heads = Inputs(*args[:N_INPUTS]), Heads(*args[N_INPUTS : N_INPUTS + N_HEADS])
    chunks = Chunks(student, inputs, heads)
    out = chunks.token_outputs(wants_of(args[N_INPUTS + N_HEADS :])[0])
    run = dense.launcher(inputs.backend).run
    for tokens in chunks:
        z = chunks.logits(0, tokens)
        run(z, chunks.inputs_of(tokens), **_parts(out, tokens))
    return finished(chunks, out)


def _head_fused(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, heads = Inputs(*args[:N_INPUTS]), Heads(*args[N_INPUTS : N_INPUTS + N_HEADS])
    wants, (*coefficients, wanted) = wants_of(args[N_INPUTS + N_HEADS :], 4)
    chunks = Chunks(student, inputs, heads)
    out = chunks.token_outputs(wants)
    c = [None if x is None else chunks.compact(x).float() for x in coefficients]
    run = dense.launcher(inputs.backend).run
    gradients = Gradients(chunks, wanted)
    for tokens in chunks:
        z = chunks.logits(0, tokens)
        g = gradients.of_logits(z, tokens)
        c_soft, c_hard, c_z = (None if x is None else x[tokens] for x in c)
        run(z, chunks.inputs_of(tokens), **_parts(out, tokens), grad=g, c_soft=c_soft, c_hard=c_hard, c_z=c_z)
        gradients.add(g, tokens)
    return finished(chunks, out, *gradients.finished())


class Gradients:
    """The gradients of the student's parts, as chunks add to them; None where not wanted."""

    def __init__(self, chunks: Chunks, wanted: list[bool]) -> None:
        heads, x, low = chunks.heads, chunks.participants[0], chunks.lows[0]
        self.weight, self.up = heads.weights[0], heads.ups[0]
        self.chunks = chunks
        self.d_student, self.d_low = (
            x.new_empty(chunks.count, of_tokens.shape[-1]) if of_tokens is not None and yes else None
            for of_tokens, yes in ((x, wanted[0]), (low, wanted[3]))
        )
        self.d_weight, self.d_bias, self.d_up = (
            torch.zeros(w.shape, dtype=torch.float32, device=x.device) if w is not None and yes else None
            for w, yes in ((self.weight, wanted[1]), (heads.biases[0], wanted[2]), (self.up, wanted[4]))
        )
        self.products: dict[torch.Size, Tensor] = {}  # of one chunk, before they are added in fp32

    def of_logits(self, z: Tensor, tokens: slice) -> Tensor:
        """Where the kernel leaves the gradient of what it reads: in its place, where that is ours."""
        if self.weight is None:
            assert self.d_student is not None
            return self.d_student[tokens]
        return z

    def add(self, g: Tensor, tokens: slice) -> None:
        """Takes a chunk's gradient of the product on to the tensors that made it."""
        if self.weight is None:
            return
        if self.d_student is not None:
            torch.mm(g, self.weight.detach(), out=self.d_student[tokens])
        if self.d_weight is not None:
            self._add_product(self.d_weight, g.t(), self.chunks.given(0, tokens))
        if self.d_bias is not None:
            self.d_bias += g.sum(0, dtype=torch.float32)
        low = self.chunks.low(0, tokens)
        if low is None or self.up is None:
            return
        if self.d_low is not None:
            torch.mm(g, self.up.detach(), out=self.d_low[tokens])
        if self.d_up is not None:
            self._add_product(self.d_up, g.t(), low)

    def _add_product(self, total: Tensor, g: Tensor, hidden: Tensor) -> None:
        if hidden.dtype == torch.float32:
            total.addmm_(g, hidden)
        elif hidden.is_cuda and PRODUCTS_ADD_IN_FP32:
            torch.addmm(total, g, hidden, out_dtype=torch.float32, out=total)
        else:
            if total.shape not in self.products:
                self.products[total.shape] = torch.empty(total.shape, dtype=hidden.dtype, device=hidden.device)
            total += torch.mm(g, hidden, out=self.products[total.shape])

    def finished(self) -> tuple[Tensor, ...]:
        """In the order of N_PARTS and the dtype of the student's tensor; without elements where not wanted."""
        student = self.chunks.participants[0]
        self.products.clear()

        def of_tokens(d: Tensor | None) -> Tensor:
            return student.new_empty(0) if d is None else self.chunks.spread(d)

        def of_columns(d: Tensor | None) -> Tensor:
            return student.new_empty(0) if d is None else d.to(student.dtype)

        d_low, d_up = of_tokens(self.d_low), of_columns(self.d_up)
        return of_tokens(self.d_student), of_columns(self.d_weight), of_columns(self.d_bias), d_low, d_up


for _device in ("CPU", "CUDA"):
    _library.impl("head_forward", _head_forward, _device)
    _library.impl("head_fused", _head_fused, _device)


def _fake_forward(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wants, _ = wants_of(args[N_INPUTS + N_HEADS :])
    return tuple(dense.token_outputs(student, Inputs(*args[:N_INPUTS]), wants).values())


def _fake_fused(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    heads, (wants, (*_, wanted)) = Heads(*args[N_INPUTS : N_INPUTS + N_HEADS]), wants_of(args[N_INPUTS + N_HEADS :], 4)
    there = (student, heads.weights[0], heads.biases[0], heads.lows[0], heads.ups[0])
    grads = [student.new_empty(0 if x is None or not yes else x.shape) for x, yes in zip(there, wanted, strict=True)]
    *terms, observed = dense.token_outputs(student, Inputs(*args[:N_INPUTS]), wants).values()
    return *terms, *grads, observed


torch.library.register_fake("kdfast::head_forward", _fake_forward)
torch.library.register_fake("kdfast::head_fused", _fake_fused)
