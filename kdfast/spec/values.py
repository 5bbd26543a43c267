"""What may be asked of a tensor beside its shape: are its values at hand, is its memory there, can it be saved?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kdfast.spec.head import LMHead
    from kdfast.spec.packed import PackedTargets
    from kdfast.spec.sparse import SparseTargets

Described = TypeVar("Described", bound="Tensor | LMHead | SparseTargets | PackedTargets")


def at_hand(device: torch.device) -> bool:
    """Whether values can be looked at: on the CPU; on a GPU, for which the host waits, with KDFAST_CHECK=1 alone.

    Never while a CUDA graph is captured, in which waiting is an error.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    return os.environ.get("KDFAST_CHECK") == "1" and not torch.cuda.is_current_stream_capturing()


def readable(x: Tensor) -> bool:
    """Whether Python may look at the values of ``x``: they are at hand, and nobody traces or transforms the call."""
    return plain(x) and at_hand(x.device)


def plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with memory of its own, in a call that nobody traces, transforms or only pretends."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) in (Tensor, nn.Parameter) and not torch._C._len_torch_dispatch_stack()


def tensors_of(name: str, x: Tensor | LMHead | SparseTargets | PackedTargets) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument, with what to call them in an error."""
    if isinstance(x, Tensor):
        yield name, x
        return
    for part, tensor in x._parts().items():
        if tensor is not None:
            yield f"{name}: {part}", tensor


def check_memory(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor whose memory was given away: reading it would end the process.

    Args:
        name: of the argument.
        x: any tensor; what has no memory of its own is left alone.
    """
    if not plain(x) or x.layout != torch.strided or x.device.type not in ("cpu", "cuda") or not x.numel():
        return
    last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    needed, there = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
    if there < needed:
        msg = (
            f"{name} is {tuple(x.shape)} {x.dtype}, which takes {needed} bytes, but its storage holds {there}: its "
            "memory was freed, as FSDP2 frees parameters when it reshards; call the loss and its backward while they "
            "are unsharded, or pass a copy"
        )
        raise ValueError(msg)


def recordable(x: Tensor) -> Tensor:
    """``x`` as autograd can save it: a tensor made under ``torch.inference_mode`` as a plain one of the same memory.

    Such a tensor has no version counter, so that a change in place, which only inference mode allows, goes unseen.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.requires_grad:
        return x
    if not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    plain = torch.empty(0, dtype=x.dtype, device=x.device)
    return plain.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def with_tensors(x: Described, fn: Callable[[Tensor], Tensor]) -> Described:
    """``x`` with a function applied to its tensors, or itself where the function leaves them as they are."""
    if isinstance(x, Tensor):
        return fn(x)  # type: ignore[return-value]  # of a tensor, a tensor
    if all(fn(tensor) is tensor for _, tensor in tensors_of("", x)):
        return x
    return x.map(fn)  # type: ignore[return-value]  # of its own kind


def first_largest(x: Tensor, none: int = -1) -> Tensor:
    """The lowest column of a row's largest value, (..., V) -> (...) int64; ``none`` where that is not finite."""
    top = x.amax(-1, keepdim=True)  # NaN where there is one
    columns = torch.arange(x.shape[-1], device=x.device)
    return torch.where(top[..., 0].isfinite(), torch.where(x == top, columns, x.shape[-1]).amin(-1), none)
