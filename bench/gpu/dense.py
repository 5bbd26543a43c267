"""The dense loss in the suite: its cases, its competitors and the bytes that it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from bench.gpu import errors
from bench.heads import peer, speculators_loss
from kdfast.benchmark.cases import ALPHA, DTYPES, TEMPERATURE
from kdfast.benchmark.competitors import eager_loss

#: Tokens where gradients are compared with fp64: more than processors, so that a program has a whole row as in the case
#: that is timed, and fewer, so that several share one.
CHECKED_TOKENS = (288, 4)


@dataclass(frozen=True)
class DenseCase:
    """A step of the loss, forward and backward, over (tokens, vocab) logits."""

    divergence: str
    tokens: int
    vocab: int
    dtype: str
    upstream: float | str = 1.0  # of the scalar loss; "per token": reduction="none" and a random upstream

    @property
    def name(self) -> str:
        """Such as ``forward_kl-8192x128256-bf16-upstream 1``."""
        up = self.upstream if isinstance(self.upstream, str) else f"upstream {self.upstream:g}"
        return f"{self.divergence}-{self.tokens}x{self.vocab}-{self.dtype}-{up}"

    @property
    def floor_bytes(self) -> int:
        """Read student, read teacher, write the gradient."""
        return 3 * self.tokens * self.vocab * DTYPES[self.dtype].itemsize


def cases(*, rehearse: bool) -> Iterator[DenseCase]:
    """Most telling first: the suite stops at its deadline."""
    if rehearse:
        yield DenseCase("forward_kl", 4, 1000, "bf16")
        yield DenseCase("jsd", 4, 700, "fp32", "per token")
        yield DenseCase("forward_kl", 1, 1001, "bf16")
        return
    for vocab in (128256, 151936):
        for divergence in ("forward_kl", "jsd", "reverse_kl"):
            yield DenseCase(divergence, 8192, vocab, "bf16")
    yield DenseCase("forward_kl", 8192, 50257, "bf16")  # odd: no row but the first begins at 16 bytes
    yield DenseCase("forward_kl", 8192, 128256, "bf16", 65536.0)
    yield DenseCase("forward_kl", 8192, 128256, "bf16", "per token")
    for vocab in (32000, 128256, 151936, 262144):
        for tokens in (1024, 8192, 16384):
            if (tokens, vocab) not in ((8192, 128256), (8192, 151936)):
                yield DenseCase("forward_kl", tokens, vocab, "bf16")
    for divergence in ("forward_kl", "jsd"):
        for vocab in (32000, 128256, 151936, 262144):
            yield DenseCase(divergence, 8192, vocab, "fp32")
    for vocab in (32000, 262144):
        yield DenseCase("jsd", 8192, vocab, "bf16")
    yield DenseCase("jsd", 8192, 128256, "bf16", 65536.0)
    yield DenseCase("jsd", 8192, 128256, "bf16", "per token")


class Inputs:
    """The tensors of a case."""

    def __init__(self, case: DenseCase, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(20)
        shape, dtype = (case.tokens, case.vocab), DTYPES[case.dtype]
        draw = lambda: torch.empty(shape, dtype=dtype, device=device).normal_(0, 2, generator=generator)  # noqa: E731
        self.student, self.teacher = draw().requires_grad_(), draw()
        self.labels = torch.randint(case.vocab, (case.tokens,), device=device, generator=generator)
        self.token_weights = torch.rand(case.tokens, device=device, generator=generator)

    def release(self) -> None:
        """Drop the gradient that the last step left."""
        self.student.grad = None


def _step(case: DenseCase, x: Inputs, loss: Callable[..., Tensor]) -> Callable[[], object]:
    """Forward and backward, into a fresh gradient."""

    def step() -> Tensor:
        x.student.grad = None
        value = loss(x.student, x.teacher, x.labels)
        upstream = x.token_weights if case.upstream == "per token" else value.new_full((), case.upstream)
        value.backward(upstream)
        return value

    return step


def _kdfast(case: DenseCase, backend: str, *, overwrite: bool = False, metrics: bool = False) -> Callable[..., Tensor]:
    options: Any = {
        "divergence": case.divergence,
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
        "backend": backend,
        "reduction": "none" if case.upstream == "per token" else "mean",
        "overwrite_logits": overwrite,
        "return_metrics": metrics,
    }
    if metrics:
        return lambda s, t, y: kdfast.distill_loss(s, t, y, **options).loss
    return lambda s, t, y: kdfast.distill_loss(s, t, y, **options)


def _eager(case: DenseCase) -> Callable[..., Tensor]:
    if case.upstream != "per token":
        return eager_loss(case.divergence)
    tau = TEMPERATURE

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(s.float() / tau, -1), F.log_softmax(t.float() / tau, -1)
        if case.divergence == "forward_kl":
            soft = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        elif case.divergence == "reverse_kl":
            soft = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        else:
            log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
            to_q, to_p = (F.kl_div(log_m, a, log_target=True, reduction="none").sum(-1) for a in (log_q, log_p))
            soft = 0.5 * (to_q + to_p)
        return ALPHA * tau * tau * soft + (1 - ALPHA) * F.cross_entropy(s.float(), y, reduction="none")

    return loss


@peer("liger_kernel")
def _liger(case: DenseCase) -> Callable[..., Tensor] | str:
    """Its KL and JSD take log-probabilities, so the log_softmax that a user needs is part of the time."""
    if case.upstream == "per token" or case.divergence == "reverse_kl":
        return "has no such loss"
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_jsd, liger_kl_div

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax(x.float() / TEMPERATURE, -1) for x in (s, t))
        if case.divergence == "forward_kl":
            soft = liger_kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        else:
            soft = liger_jsd(log_p, log_q, beta=0.5)
        hard = liger_cross_entropy(s, y)
        hard = hard[0] if isinstance(hard, tuple) else hard
        return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard

    return loss


def _speculators(case: DenseCase) -> Callable[..., Tensor] | str:
    """T = 1 and no cross-entropy: less work than the others do."""
    function = speculators_loss(case.divergence)
    if isinstance(function, str):
        return function

    def loss(s: Tensor, t: Tensor, _: Tensor) -> Tensor:
        tokens = function(s, t)
        return tokens if case.upstream == "per token" else tokens.mean()

    return loss


def competitors(case: DenseCase, x: Inputs) -> dict[str, Callable[[], object] | str]:
    """Steps by name; the text of who cannot run it says why. kdfast stands first."""
    losses: dict[str, Callable[..., Tensor] | str] = {
        "kdfast": _kdfast(case, "triton"),
        "kdfast, metrics": _kdfast(case, "triton", metrics=True),
        "eager": _eager(case),
        "torch.compile": torch.compile(_eager(case), dynamic=False) if x.student.is_cuda else "needs a GPU here",
        "liger": _liger(case),
        "speculators (T = 1, no CE)": _speculators(case),
    }
    return {name: loss if isinstance(loss, str) else _step(case, x, loss) for name, loss in losses.items()}


def tolerance(case: DenseCase) -> float:
    """See :mod:`bench.gpu.errors`."""
    return errors.GRADIENT[case.dtype]


def gradient_errors(case: DenseCase, device: torch.device) -> dict[str, Any]:
    """See :mod:`bench.gpu`; on fresh inputs of few tokens."""
    found: dict[str, Any] = {}
    for tokens in dict.fromkeys(min(case.tokens, n) for n in CHECKED_TOKENS):
        small = replace(case, tokens=tokens)
        x, exact = Inputs(small, device), Inputs(small, device)
        with torch.no_grad():
            x.student.normal_(0, 2)
            x.teacher.normal_(0, 2)
        exact.student, exact.teacher = x.student.detach().double().requires_grad_(), x.teacher.double()
        _step(small, exact, _kdfast(small, "reference"))()
        assert exact.student.grad is not None
        for name, loss in (("kdfast", _kdfast(small, "triton")), ("eager", _eager(small))):
            _step(small, x, loss)()
            assert x.student.grad is not None
            error = errors.worst(x.student.grad, exact.student.grad)
            found[name] = errors.larger(found[name], error) if name in found else error
    return found
