"""A teacher's passes: in eval mode and without gradient each, and the student's modules as they were."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from kdfast.methods.layers import Hook


class Quiet:
    """Keeps a teacher in eval mode and without gradient: from here to :meth:`remove`, in each of its forward passes.

    An outer ``train()``, as of a module that holds both models, reaches the teacher too, so that its mode is looked at
    before each pass. Modules that it shares with the student are in eval mode during the pass alone, and as before
    after it. A pass whose inputs require a gradient, as those that a generator made, keeps it, and so does a teacher
    that is a student as well, as in mutual learning, or a part of one. As a context manager it does what its hooks do,
    for a teacher whose hooks are compiled away.

    Args:
        teacher: a module.
        student: whose modules it may share.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._modes = modes = _Modes(teacher, student)
        handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove, handles)  # for who is given up without an end
        if teacher._compiled_call_impl is None:  # else they would be traced
            handles += [
                teacher.register_forward_pre_hook(
                    Hook(lambda _, args, kwargs: modes.begin(args, kwargs)), prepend=True, with_kwargs=True
                ),
                teacher.register_forward_hook(Hook(lambda *_: modes.end()), always_call=True),
            ]

    def __enter__(self) -> None:
        self._modes.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.end()

    def remove(self) -> None:
        """Takes the hooks away, and gives the teacher's own modules their modes of before."""
        self._finalizer()
        self._modes.restore()


#: Modules that somebody keeps in eval mode: their mode of before the first, and who does. The last one to go gives it
#: back, whichever that is.
_HELD: weakref.WeakKeyDictionary[nn.Module, tuple[bool, weakref.WeakSet[_Modes]]] = weakref.WeakKeyDictionary()
#: Those that are not removed yet.
_LIVE: weakref.WeakSet[_Modes] = weakref.WeakSet()


class _Modes:
    """The modes of a teacher's modules. Hooks hold it alone, so that who gives up a Quiet leaves nothing behind."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        mine = set(student.modules())
        self.own = [module for module in teacher.modules() if module not in mine]
        self.shared = [module for module in teacher.modules() if module in mine]
        self.teacher, self.students = weakref.ref(teacher), weakref.WeakSet(mine)
        _LIVE.add(self)
        # Of each pass that is under way the modes of what is shared, and whether there were gradients around it.
        self.passes: list[tuple[list[bool], bool]] = []
        for module in self.own:
            _, holders = held = _HELD.get(module, (module.training, weakref.WeakSet()))
            _HELD[module] = held if holders else (module.training, holders)
            holders.add(self)
            module.training = False

    def begin(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        for module in self.own:
            if module.training:
                module.training = False
        gradients = torch.is_grad_enabled()
        self.passes.append(([module.training for module in self.shared], gradients))
        for module in self.shared:
            module.training = False
        if gradients and not self._trained() and not _differentiable((args, kwargs)):
            torch.set_grad_enabled(False)

    def _trained(self) -> bool:
        """Whether the teacher is a student, or a part of one: of this Distiller or of another."""
        teacher = self.teacher()
        return any(teacher in one.students for one in _LIVE)

    def end(self) -> None:
        if self.passes:  # else another hook failed before this one's pass began
            modes, gradients = self.passes.pop()
            for module, training in zip(self.shared, modes, strict=True):
                module.training = training
            if gradients:
                torch.set_grad_enabled(True)

    def restore(self) -> None:
        _LIVE.discard(self)
        for module in self.own:
            training, holders = _HELD.get(module, (False, weakref.WeakSet()))
            holders.discard(self)
            if not holders and _HELD.pop(module, None) is not None:
                module.training = training


def _differentiable(inputs: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inputs))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
