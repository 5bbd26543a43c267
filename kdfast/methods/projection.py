"""Losses inside a model's own forward pass, at its output projection, where a wrapper has the weight whole.

A loss of an :class:`kdfast.LMHead` needs hidden states and the output projection's weight. Outside the forward pass a
wrapper has no say: DistributedDataParallel does not average what is computed there, and after it FSDP and ZeRO have
taken the weight apart again. So the wrapper is called as ever, with its inputs; the projection, when its turn comes,
computes the loss in the place of the logits; and the loss is what the wrapper returns. Hooks of all modules run, those
around the projection too, which is how each wrapper does its work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.methods.gate import nothing_of
from kdfast.methods.layers import unwrapped
from kdfast.methods.step import logits_of
from kdfast.spec.head import Cap, LMHead

CHECKED_TOKENS = 32
_RUNNING: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose forward pass is redirected now

#: What computes on an LMHead: the loss, 0-d, and what else is to come out, detached.
Use = Callable[[LMHead], tuple[Tensor, Mapping[str, Tensor]]]


class Projection:
    """A model's output projection, at which its logits are described and never made.

    Args:
        module: the last that the model computes but for scale and softcap: ``nn.Linear``, or what calls one.
        scale: factor that the model puts on the projection's output.
        softcap: bound of the logits after it, as :class:`kdfast.LMHead` has it.
        name: of the model, for messages.
        linear: the ``nn.Linear`` whose weight and bias they are; None: ``module`` itself.
        low_rank: of hidden states (..., H) the two factors that ``module`` adds, as :class:`kdfast.LMHead` has them.

    Raises:
        ValueError: a module that computes anything else than a product with its own floating-point weight and a bias:
            an adapter, a quantised or parametrised layer; it is named.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        name: str = "the model",
        linear: nn.Module | None = None,
        low_rank: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = None,
    ) -> None:
        linear = module if linear is None else linear
        kind = type(linear)
        weight = None if torch.nn.utils.parametrize.is_parametrized(linear) else getattr(linear, "weight", None)
        # A weight of a class of its own, as torchao's, computes its products itself; FSDP's is whole in forward.
        kinds = (Tensor, nn.Parameter)
        whole = isinstance(weight, Tensor) and (type(weight.data) in kinds or hasattr(weight, "device_mesh"))
        if not (kind.forward is nn.Linear.forward and whole and weight.is_floating_point()):  # type: ignore[union-attr]
            what = f"{kind.__module__}.{kind.__name__}"
            if kind is nn.Linear and isinstance(weight, Tensor):
                what += f" with a weight of {type(weight.data).__name__}, {weight.dtype}"
            msg = (
                f"{name}: its output projection is a {what}, and not a product with a floating-point weight alone: "
                "leave it as it was when the model is adapted or quantised, or use the model's own logits"
            )
            raise ValueError(msg)
        self.module = module
        self.linear = linear
        self.low_rank = low_rank
        self.scale = scale
        self.softcap = softcap
        self.name = name
        self.checked = False

    def head(self, hidden: Tensor) -> LMHead:
        """The logits of hidden states (..., H); inside the module's forward pass, where its weight is whole."""
        bias: Any = getattr(self.linear, "bias", None)
        weight: Any = self.linear.weight
        low_rank = self._added(hidden)
        if any(hasattr(x, "device_mesh") for x in (weight, hidden, *(low_rank or ()))):
            msg = (
                f"{self.name}: its output projection is sharded inside the forward pass too, as by tensor parallelism: "
                "leave it out of the plan, or give kdfast.distill_loss the model's own logits, which are a DTensor then"
            )
            raise ValueError(msg)
        return LMHead(hidden, weight, bias, softcap=self.softcap, scale=self.scale, low_rank=low_rank)

    def _added(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        added = None if self.low_rank is None else self.low_rank(hidden)
        if added is not None and added[1].shape[0] != self.linear.out_features:
            msg = f"{self.name}: an adapter of its output projection is partitioned, as by ZeRO-3: leave that one out"
            raise ValueError(msg)
        return added

    def run(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        use: Use,
        more: Callable[[Any], Mapping[str, tuple[Tensor, Tensor]]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Calls a wrapped model, with ``use`` in the place of its logits.

        Args:
            model: may be wrapped.
            args: its arguments.
            kwargs: its arguments by name.
            use: of the head, inside the model's forward pass.
            more: of what the model returned, by name what is to be added, and what to report of it.

        Returns:
            The loss, and what ``use`` returned beside it.

        Raises:
            RuntimeError: the model does not come to its output projection, or is in its forward pass already.
        """
        terms: dict[str, Tensor] = {}
        losses: list[Tensor] = []  # as it is here: a wrapper may round what it returns

        def inside(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
            def project(hidden: Tensor) -> Tensor:
                if begun:
                    raise RuntimeError(_again(self.name))
                begun.append(True)
                loss, found = use(self.head(hidden))
                losses.append(loss)
                terms.update(found)
                # What hooks of the module see, and FSDP begins its backward pass at: one number in the logits' shape.
                return loss.expand(*hidden.shape[:-1], 1).clone()

            begun: list[bool] = []
            out: list[Tensor] = []
            last = self.module.register_forward_hook(lambda module, args, output: out.append(output))
            try:
                with replaced(self.module, torch.compiler.disable(project)):
                    raw = call(*args, **kwargs)
            finally:
                last.remove()
            self._once(losses, model)
            loss = losses[0] + nothing_of(out[0])
            for name, (extra, term) in (more(raw) if more is not None else {}).items():
                loss = loss + extra
                terms[name] = term
            losses[0] = loss
            return loss

        returned = redirect(model, inside, args, kwargs)
        # By way of what a wrapper returns its backward pass begins, before that of the loss itself, which takes part.
        loss = losses[0] + nothing_of(returned)
        return loss, {**terms, "loss": loss.detach()}

    @contextlib.contextmanager
    def whole(self, hidden: Tensor) -> Iterator[LMHead]:
        """The logits of hidden states outside the module's forward pass: a sharded weight is gathered for so long.

        Collective for a model of ``fully_shard`` or ZeRO-3.

        Raises:
            ValueError: a weight that FullyShardedDataParallel keeps in a flat parameter.
        """
        bias: Any = getattr(self.linear, "bias", None)
        weight: Any = self.linear.weight
        with contextlib.ExitStack() as stack:
            if hasattr(weight, "ds_id"):
                import deepspeed

                stack.enter_context(
                    deepspeed.zero.GatheredParameters([one for one in (weight, bias) if one is not None])
                )
            if weight.is_meta:
                msg = f"{self.name}: its output projection's weight is offloaded between passes: give no teacher_head"
                raise ValueError(msg)
            parts = [None if one is None else _whole(one.detach()) for one in (weight, bias)]
            if parts[0] is None or parts[0].dim() != 2:
                msg = (
                    f"{self.name}: its output projection's weight is in a flat parameter of FullyShardedDataParallel: "
                    "shard it with fully_shard, or give no teacher_head"
                )
                raise ValueError(msg)
            if self.low_rank is not None and (hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")):
                msg = f"{self.name}: its output projection is adapted and sharded: give no teacher_head"
                raise ValueError(msg)
            low_rank = self._added(hidden)
            yield LMHead(hidden, parts[0], parts[1], softcap=self.softcap, scale=self.scale, low_rank=low_rank)

    def hidden(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Calls a model without its logits, and returns the hidden states (..., H) that they would be made of."""
        found: list[Tensor] = []

        def project(hidden: Tensor) -> Tensor:
            found.append(hidden)
            return hidden[..., :1].clone()  # which a model may change in place

        with replaced(self.module, torch.compiler.disable(project)):
            model(*args, **kwargs)
        self._once(found, model)
        return found[0]

    def _once(self, found: Sequence[Any], model: nn.Module) -> None:
        if not found and all(module is not self.module for module in model.modules()):
            msg = f"the head is of another model, {self.name}, than of the one that is called: give that one's own"
            raise ValueError(msg)
        if len(found) != 1:
            msg = (
                f"{self.name} came {len(found)} times to its output projection in one forward pass, once is needed: "
                "one that Liger or Unsloth has patched may compute its loss elsewhere; use it as it was, or its "
                "own logits"
            )
            raise RuntimeError(msg)

    @torch.no_grad()
    def check(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        agree: Callable[[bool, torch.device], bool] | None = None,
    ) -> None:
        """Compares scale and softcap with the model's own forward pass, over the first tokens of the first sample.

        In eval mode, through the wrapper, whose ranks all have to come here. What may differ is rounding: 4 eps of the
        largest logit of a token anywhere, eps in the root mean square.

        Args:
            model: may be wrapped.
            args: its arguments.
            kwargs: its arguments by name.
            agree: whether all ranks found what this one did, so that all of them raise.

        Raises:
            ValueError: they differ by more, here or on another rank.
        """
        products: list[Tensor] = []
        finding: list[str] = []

        def project(hidden: Tensor) -> Tensor:
            few = hidden[:1, :CHECKED_TOKENS] if hidden.dim() > 2 else hidden[:1]
            head = self.head(few)  # here, where the weight is whole, and by autocast's rules
            products.append(dataclasses.replace(head, softcap=None, scale=1.0).logits())
            return products[0].clone()  # which the model may scale in place

        def inside(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
            with replaced(self.module, torch.compiler.disable(project)):
                try:
                    raw = call(*args, **kwargs)
                except RuntimeError as error:
                    if not products:
                        raise
                    msg = f"{self.name} does not take the logits of its first tokens in the place of all: {error}"
                    raise RuntimeError(msg) from error
            theirs = logits_of(raw)
            if products and isinstance(theirs, Tensor):
                with torch.autocast(theirs.device.type, enabled=False):
                    finding.append(self.difference(products[0], theirs))
            return torch.zeros(())

        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            redirect(model, inside, args, kwargs)
        finally:
            for module, training in modes:
                module.training = training
        self._once(products, model)
        wrong = next((one for one in finding if one), "")
        if agree is not None and not agree(not wrong, products[0].device) and not wrong:
            wrong = f"{self.name} makes its logits otherwise than by its output projection alone, on another rank"
        if wrong:
            raise ValueError(wrong)
        self.checked = bool(products[0].numel())

    def difference(self, product: Tensor, theirs: Tensor) -> str:
        """What is to be said of a model whose logits are not those of the projection; "" where but rounding differs.

        Args:
            product: of hidden states and weight, with the bias.
            theirs: the model's own logits of the same tokens.
        """
        ours, name = Cap(self.scale, self.softcap or 0.0).logits(product), self.name
        if not ours.numel():
            return ""
        if ours.shape != theirs.shape:
            return f"{name} gives logits {tuple(theirs.shape)}, hidden states and output projection {tuple(ours.shape)}"
        eps = torch.finfo(product.dtype).eps  # the model rounds to it scaled and capped logits, too
        finite = theirs.isfinite()
        same_holes = torch.equal(ours.isfinite(), finite)
        a, b = (torch.where(finite, x.double(), 0.0) for x in (ours, theirs))
        worst = (a - b).abs().amax(-1)
        spread = (a - b).square().mean().sqrt()
        if (
            same_holes
            and bool((worst <= 4 * eps * b.abs().amax(-1)).all())
            and bool(spread <= eps * b.square().mean().sqrt())
        ):
            return ""
        most, largest = worst.max().item(), b.abs().max().item()
        factor = ((a * b).sum() / a.square().sum()).item()
        constant = bool((a * factor - b).abs().max() <= 8 * eps * b.abs().max())
        how = f"are {factor:g} times as large" if constant else f"differ by up to {most:.3g}"
        return (
            f"{name} makes its logits otherwise than by output projection, scale {self.scale:g} and softcap "
            f"{self.softcap}: they {how}, where the largest is {largest:.3g}"
        )


def _again(name: str) -> str:
    return f"{name} is in its forward pass, where its head computes the losses: no loss may run it again"


def _whole(x: Any) -> Tensor:
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass of one module, for a while; its hooks stay, those of Accelerate among them."""
    # Accelerate's, which take inputs and weights to a device, stand in the place of the forward pass and keep it apart.
    name = "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"
    before = vars(module).get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def redirect(
    model: nn.Module,
    inside: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Calls a wrapped model so that what it wraps runs ``inside(call, ...)``, ``call`` being its own forward pass.

    Its wrappers see one call of the model, with its arguments, and the tensor that ``inside`` returns. A compiled model
    is compiled within ``call``.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        msg = "a model in DataParallel computes in replicas, which no head can be given to: use DistributedDataParallel"
        raise ValueError(msg)
    inner = unwrapped(model)
    if inner in _RUNNING:
        raise RuntimeError(_again(type(inner).__name__))
    call = vars(inner).get("_old_forward", inner.forward) if hasattr(inner, "_hf_hook") else inner.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with replaced(inner, call):
            return inside(call, *args, **kwargs)

    _RUNNING.add(inner)
    try:
        with replaced(inner, torch.compiler.disable(forward, recursive=False)):
            returned: Tensor = model(*args, **kwargs)
    finally:
        _RUNNING.discard(inner)
    return returned
