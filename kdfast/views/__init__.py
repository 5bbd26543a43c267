"""Tensors as the compiled extension takes them: an address, a dtype by name, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EXTENSION_MISSING", "_core", "classes_apart", "contiguous_rows", "kernel_rows", "view"]

#: Why there is no compiled extension, or None where there is.
EXTENSION_MISSING: str | None = None
try:
    from kdfast import _core
except ImportError as error:  # a source tree whose extension was not built; the registry says so and goes on without
    _core = None  # type: ignore[assignment]
    EXTENSION_MISSING = f"the compiled extension is missing ({error})"

_DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def view(x: Tensor) -> _core.View:
    """What the extension is given of a tensor on the CPU; it must outlive the call."""
    there = int(x.untyped_storage().nbytes()) - int(x.storage_offset()) * x.element_size()
    return _core.View(x.data_ptr(), _DTYPE_NAMES[x.dtype], x.shape, x.stride(), there)


def contiguous_rows(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous rows: itself, unless its last axis is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def classes_apart(x: Tensor) -> bool:
    """Whether not the classes but the tokens lie side by side in memory, as those of images (B, C, H, W) do."""
    return x.dim() > 1 and min(x.shape[-2:]) > 1 and x.stride(-1) > 1 and x.stride(-2) == 1


def kernel_rows(x: Tensor) -> Tensor:
    """Return ``x`` as the CPU's dense kernel reads it: itself, unless neither classes nor tokens are contiguous."""
    return x if classes_apart(x) else contiguous_rows(x)
