"""Mends Triton's interpreter where it differs from every GPU, and where it is slow for no reason."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_original = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor


def _convert(values, source, target, rounding_mode):
    """Rounds fp32 to bf16, which the original cuts off."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.uint32)
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return _original(values, source, target, rounding_mode)


def _patch_once(fn):
    """Patches the language for a kernel, and not again for each function that it calls: half of the time went there."""
    modules = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
    done = modules and not any(tl.core.is_builtin(m.load) for m in modules)
    return interpreter._LangPatchScope() if done else _patch_lang(fn)


def _patch_index(tensor, scope):
    """Scalars, which are arrays of one number, as bounds of loops: older releases ask NumPy for what 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _fma(_, x, y, z):
    """Rounds once, which older releases do not."""
    wide = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _sort(x, dim=None, descending=False):
    """At once, where Triton's own sort takes its steps one element at a time."""
    values = np.sort(x.handle.data, axis=-1)
    return tl.tensor(interpreter.TensorHandle(values[..., ::-1] if descending else values, x.dtype.scalar), x.type)


def mend():
    """Apply, for the life of the process."""
    interpreter._convert_float = _convert
    interpreter._patch_lang = _patch_once
    interpreter._patch_lang_tensor = _patch_index
    interpreter.InterpreterBuilder.create_fma = _fma
    tl.sort = _sort
    np.seterr(all="ignore")  # -inf - -inf and its like are part of the kernels, and no GPU warns
