"""Who computes a loss from hidden states and the weights of output projections, on any device.

Two losses: distillation with a student's and a teacher's head, and the cross-entropy of the student's alone. Peers that
are not installed are named with the reason. A name says what a peer leaves out.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from kdfast.benchmark.cases import ALPHA, TEMPERATURE
from kdfast.benchmark.competitors import eager_loss
from kdfast.ops.head import operators as head

P, R = ParamSpec("P"), TypeVar("R")
Steps = dict[str, Callable[[], object] | str]

#: The matrix products of a step and nothing else: the floor.
PRODUCTS = "bare products"


class HeadInputs:
    """Hidden states (tokens, hidden), weights (vocab, hidden) and labels (tokens,); logits of unit variance."""

    def __init__(
        self, tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device | str, seed: int = 20
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(rows: int, std: float) -> Tensor:
            return torch.empty(rows, hidden, dtype=dtype, device=device).normal_(0, std, generator=generator)

        self.hidden, self.teacher_hidden = draw(tokens, 1.0).requires_grad_(), draw(tokens, 1.0)
        self.weight, self.teacher_weight = draw(vocab, hidden**-0.5).requires_grad_(), draw(vocab, hidden**-0.5)
        self.labels = torch.randint(vocab, (tokens,), device=device, generator=generator)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What gets a gradient."""
        return self.hidden, self.weight

    def double(self) -> HeadInputs:
        """The same in fp64."""
        out = copy.copy(self)
        for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
            tensor = getattr(self, name)
            setattr(out, name, tensor.detach().double().requires_grad_(tensor.requires_grad))
        return out

    def release(self) -> None:
        """Steps return their gradients and leave nothing behind."""


def peer(module: str) -> Callable[[Callable[P, R]], Callable[P, R | str]]:
    """Makes a function that imports a peer's module return why it cannot, where that is so."""

    def decorate(build: Callable[P, R]) -> Callable[P, R | str]:
        @functools.wraps(build)
        def built(*args: P.args, **options: P.kwargs) -> R | str:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
            try:
                return build(*args, **options)
            except Exception as error:  # whatever a peer raises on a machine or torch that it does not know
                return f"{module}: {(str(error).splitlines() or [''])[0][:200]}"

        return built

    return decorate


def _steps(x: HeadInputs, losses: dict[str, Callable[[], Tensor] | str]) -> Steps:
    """Forward and backward of every loss."""

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), x.leaves)

    return {name: loss if isinstance(loss, str) else step(loss) for name, loss in losses.items()}


def _compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()  # or the shapes that came before would count against the limit of compilations
    return torch.compile(loss, dynamic=False)


def _chunk(x: HeadInputs, *, heads: int) -> int:
    """Tokens that kdfast takes at a time."""
    budget = head.CHUNK_BYTES[x.hidden.device.type]
    return head.chunk_rows(x.hidden.shape[0], heads * x.weight.nbytes // x.weight.shape[1], budget)


def _bare_products(x: HeadInputs, *, heads: int) -> Callable[[], object]:
    """Logits of each head, and the gradients of hidden states and weight, in the chunks that kdfast takes."""
    tokens, vocab, rows = x.hidden.shape[0], x.weight.shape[0], _chunk(x, heads=heads)

    @torch.no_grad()
    def products() -> tuple[Tensor, ...]:
        d_hidden, d_weight = torch.empty_like(x.hidden), torch.zeros_like(x.weight)
        s, t = (x.hidden.new_empty(rows if k < heads else 0, vocab) for k in range(2))
        for a in range(0, tokens, rows):
            chunk = x.hidden[a : a + rows]
            n = chunk.shape[0]
            torch.mm(chunk, x.weight.T, out=s[:n])
            if heads == 2:
                torch.mm(x.teacher_hidden[a : a + rows], x.teacher_weight.T, out=t[:n])
            torch.mm(s[:n], x.weight, out=d_hidden[a : a + n])
            d_weight.addmm_(s[:n].T, chunk)
        return d_hidden, d_weight

    return products


# --- Two heads --------------------------------------------------------------------------------------------------------


def kdfast_distillation(x: HeadInputs, divergence: str, backend: str | None = None) -> Tensor:
    """The loss over both heads, without stored logits."""
    student, teacher = kdfast.LMHead(x.hidden, x.weight), kdfast.LMHead(x.teacher_hidden, x.teacher_weight)
    options: dict[str, Any] = {"divergence": divergence, "temperature": TEMPERATURE, "alpha": ALPHA}
    return kdfast.distill_loss(student, teacher, x.labels, backend=backend, **options)


def eager_distillation(x: HeadInputs, divergence: str) -> Tensor:
    """The formula of docs/benchmarks.md over stored logits."""
    return eager_loss(divergence)(x.hidden @ x.weight.T, x.teacher_hidden @ x.teacher_weight.T, x.labels)


def distillation(
    x: HeadInputs, divergence: str, *, backend: str | None = None, compiles: bool = True, triton: bool = False
) -> Steps:
    """Steps of forward KL or jsd with cross-entropy; ``triton`` asks for the peers whose kernels need it, too."""
    beta = {"forward_kl": 0.0, "jsd": 0.5}[divergence]
    losses: dict[str, Callable[[], Tensor] | str] = {
        "kdfast": lambda: kdfast_distillation(x, divergence, backend),
        "eager, stored logits": lambda: eager_distillation(x, divergence),
    }
    compiled = _compiled(lambda: eager_distillation(x, divergence)) if compiles else "not compiled here"
    losses["torch.compile, stored logits"] = compiled
    losses["TRL, chunked (no CE)"] = _trl(x, beta)
    losses["Liger, chunked (no tau^2)"] = _liger_chunked(x, beta, compiled=compiles)
    if triton:
        losses["Liger, fused linear JSD (no CE)"] = _liger_fused(x, beta)
        losses["fla (T = 1, no CE)"] = _fla(x) if divergence == "forward_kl" else "fla has no jsd"
        losses["speculators, stored logits (T = 1, no CE)"] = _speculators(x, divergence)
    steps = _steps(x, losses)
    return {"kdfast": steps.pop("kdfast"), PRODUCTS: _bare_products(x, heads=2), **steps}


@peer("trl")
def _trl(x: HeadInputs, beta: float) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None)
    options = (beta, TEMPERATURE, 1.0, None, 1.0, None)  # scales and softcaps of both

    def loss() -> Tensor:
        tokens, _ = ChunkedDivergenceFunction.apply(*heads, *options)
        return tokens.mean()

    return loss


@peer("liger_kernel")
def _liger_chunked(x: HeadInputs, beta: float, *, compiled: bool) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weights = {"weight_hard_loss": 1 - ALPHA, "weight_soft_loss": ALPHA}
    loss = LigerFusedLinearJSDLoss(**weights, beta=beta, temperature=TEMPERATURE, compiled=compiled, chunk_size=1024)
    return lambda: loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)


@peer("liger_kernel")
def _liger_fused(x: HeadInputs, beta: float) -> Callable[[], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    heads = (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
    return lambda: liger_fused_linear_jsd(*heads, jsd_beta=beta, temperature=TEMPERATURE)


@peer("fla")
def _fla(x: HeadInputs) -> Callable[[], Tensor]:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    def loss() -> Tensor:
        value = fused_kl_div_loss(x.hidden, x.teacher_hidden, x.weight, x.teacher_weight)
        return value[0] if isinstance(value, tuple) else value

    return loss


@peer("speculators")
def speculators_loss(divergence: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Per-token losses, (N,), of logits (N, V)."""
    from speculators.losses import fused

    names = {"forward_kl": "fused_kl_div_loss", "reverse_kl": "fused_reverse_kl_div_loss", "jsd": "fused_js_div_loss"}
    function = getattr(fused, names[divergence])
    return lambda s, t: function(s[None], t[None])[0]


def _speculators(x: HeadInputs, divergence: str) -> Callable[[], Tensor] | str:
    tokens = speculators_loss(divergence)
    if isinstance(tokens, str):
        return tokens
    return lambda: tokens(x.hidden @ x.weight.T, x.teacher_hidden @ x.teacher_weight.T).mean()


# --- The student's head alone -----------------------------------------------------------------------------------------


def kdfast_cross_entropy(x: HeadInputs, backend: str | None = None) -> Tensor:
    """The cross-entropy of a head, without stored logits."""
    return kdfast.distill_loss(kdfast.LMHead(x.hidden, x.weight), labels=x.labels, backend=backend)


def eager_cross_entropy(x: HeadInputs) -> Tensor:
    """The same over stored logits."""
    return F.cross_entropy((x.hidden @ x.weight.T).float(), x.labels)


def cross_entropy(x: HeadInputs, *, backend: str | None = None, compiles: bool = True, triton: bool = False) -> Steps:
    """Steps of the cross-entropy alone; ``triton`` asks for the peers whose kernels need it."""
    losses: dict[str, Callable[[], Tensor] | str] = {
        "kdfast": lambda: kdfast_cross_entropy(x, backend),
        "eager, stored logits": lambda: eager_cross_entropy(x),
        "torch.compile, stored logits": _compiled(lambda: eager_cross_entropy(x)) if compiles else "not compiled here",
        "torch's linear_cross_entropy, kdfast's chunks": _torch_linear(x, batch_chunk_size=_chunk(x, heads=1)),
    }
    if triton:
        losses["torch's linear_cross_entropy, its chunks"] = _torch_linear(x)
        losses["cut-cross-entropy"] = _cut(x, impl="cce")
        losses["cut-cross-entropy, no filter"] = _cut(x, impl="cce", filter_eps=None)
        losses["Liger, fused linear cross-entropy"] = _liger_linear(x)
    else:
        losses["cut-cross-entropy, torch_compile"] = _cut(x, impl="torch_compile") if compiles else "not compiled here"
    steps = _steps(x, losses)
    return {"kdfast": steps.pop("kdfast"), PRODUCTS: _bare_products(x, heads=1), **steps}


def _torch_linear(x: HeadInputs, batch_chunk_size: int | None = None) -> Callable[[], Tensor] | str:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none that goes in chunks"
    method = "auto" if batch_chunk_size is None else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size, chunking_method=method)
    return lambda: F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


@peer("cut_cross_entropy")
def _cut(x: HeadInputs, **options: Any) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(x.hidden, x.weight, x.labels, **options)


@peer("liger_kernel")
def _liger_linear(x: HeadInputs) -> Callable[[], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss() -> Tensor:
        value = liger_fused_linear_cross_entropy(x.hidden, x.weight, x.labels)
        return value[0] if isinstance(value, tuple) else value

    return loss
