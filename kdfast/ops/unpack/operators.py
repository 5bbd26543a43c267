"""Who runs ``kdfast::unpack``, whose schema is :mod:`kdfast.spec.packed`'s: the same bits on every device."""

from __future__ import annotations

import torch

from kdfast.ops.unpack import cpu, triton

_library = torch.library.Library("kdfast", "FRAGMENT")
_library.impl("unpack", cpu.unpack, "CPU")
_library.impl("unpack", triton.unpack, "CUDA")
