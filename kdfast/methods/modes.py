"""A teacher's mode: eval in every forward pass, and the student's modules as they were."""

from __future__ import annotations

import weakref
from types import TracebackType

from torch import nn
from torch.utils.hooks import RemovableHandle

from kdfast.methods.layers import Hook


class Quiet:
    """Keeps a teacher in eval mode: from here to :meth:`remove`, and in each of its forward passes.

    An outer ``train()``, as of a module that holds both models, reaches the teacher too, so that its mode is looked at
    before each pass. Modules that it shares with the student are in eval mode during the pass alone, and as before
    after it. As a context manager it does what its hooks do, for a teacher whose hooks are compiled away.

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
                teacher.register_forward_pre_hook(Hook(lambda *_: modes.begin()), prepend=True),
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


class _Modes:
    """The modes of a teacher's modules. Hooks hold it alone, so that who gives up a Quiet leaves nothing behind."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        mine = set(student.modules())
        self.own = [module for module in teacher.modules() if module not in mine]
        self.shared = [module for module in teacher.modules() if module in mine]
        self.passes: list[list[bool]] = []  # modes of what is shared, of each pass that is under way
        for module in self.own:
            _, holders = held = _HELD.get(module, (module.training, weakref.WeakSet()))
            _HELD[module] = held if holders else (module.training, holders)
            holders.add(self)
            module.training = False

    def begin(self) -> None:
        for module in self.own:
            if module.training:
                module.training = False
        self.passes.append([module.training for module in self.shared])
        for module in self.shared:
            module.training = False

    def end(self) -> None:
        if self.passes:  # else another hook failed before this one's pass began
            for module, training in zip(self.shared, self.passes.pop(), strict=True):
                module.training = training

    def restore(self) -> None:
        for module in self.own:
            training, holders = _HELD.get(module, (False, weakref.WeakSet()))
            holders.discard(self)
            if not holders and _HELD.pop(module, None) is not None:
                module.training = training


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
