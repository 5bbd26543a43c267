"""Tensors as the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from kdfast.views import view

if TYPE_CHECKING:
    from kdfast import _core


def cache_tensors(tensors: Mapping[str, Tensor]) -> _core.CacheTensors:
    """The engine's view of the fields of some targets: ``ids`` and, by name, those that are there."""
    from kdfast import _core

    fields = {name: view(value) for name, value in tensors.items()}
    return _core.CacheTensors(fields.pop("ids"), **fields)
