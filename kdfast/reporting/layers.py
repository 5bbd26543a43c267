"""Which layers of two models are compared, and which rows of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdfast.methods.layers import Capture, matching, own_path, parse, unwrapped

MOST = 8  # layers of a model that are chosen where none are named
PASSED_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in eval mode


def expanded(model: nn.Module, patterns: Sequence[str], who: str) -> list[str]:
    """Patterns with each module's own path, every one once.

    Raises:
        ValueError: a pattern that matches no module.
    """
    found = []
    for pattern in patterns:
        part = parse(pattern).part
        found += [
            path if part == "output" and path else f"{path}:{part}" for path in matching(unwrapped(model), pattern, who)
        ]
    return list(dict.fromkeys(found))


def chosen(model: nn.Module, run: Callable[[], object], examples: int) -> list[str]:
    """Some of a model's layers, evenly spread from first to last.

    Stages of a model are its own children; lists of blocks count as their blocks, and where there are fewer than four
    stages, each as its children.

    Args:
        model: may be wrapped.
        run: runs it once.
        examples: in that run; a layer is one whose output has them as its first dimension.
    """
    inner = unwrapped(model)
    shapes: dict[str, list[Tensor | None]] = {path: [] for path in _stages(inner)}

    def note(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            shapes[path].append(first if isinstance(first, Tensor) else None)

        return hook

    handles = [inner.get_submodule(path).register_forward_hook(note(path)) for path in shapes]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    usable = [own_path(path) for path, seen in shapes.items() if len(seen) == 1 and _is_layer(seen[0], examples)]
    if len(usable) <= MOST:
        return usable
    return [usable[i * (len(usable) - 1) // (MOST - 1)] for i in range(MOST)]


def _is_layer(tensor: Tensor | None, examples: int) -> bool:
    return tensor is not None and tensor.is_floating_point() and tensor.dim() >= 2 and len(tensor) == examples


def _stages(model: nn.Module) -> list[str]:
    stages = [(name, child) for name, child in model.named_children()]
    while True:
        few = len(stages) < 4
        wider: list[tuple[str, nn.Module]] = []
        for path, module in stages:
            blocks = isinstance(module, nn.ModuleList)
            block = path.rpartition(".")[0] and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList)
            holds = any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in module.modules())
            if next(module.children(), None) is not None and (blocks or (not block and (few or holds))):
                wider += [(f"{path}.{name}", child) for name, child in module.named_children()]
            else:
                wider.append((path, module))
        if len(wider) == len(stages) and [p for p, _ in wider] == [p for p, _ in stages]:
            return [path for path, module in stages if not isinstance(module, PASSED_THROUGH)]
        stages = wider


class Layers:
    """Hooks on the layers of one model, and their outputs as rows.

    Args:
        model: may be wrapped.
        patterns: of single modules, see :func:`expanded`.
        who: in messages.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], who: str) -> None:
        self._capture = Capture(model, patterns, who, detach=True)
        self.who = who
        self.names: dict[str, list[str]] = {}  # of the last tensors taken, by pattern

    def take(self, examples: int) -> list[Tensor]:
        """The tensors of the last forward pass, each with the examples as its first dimension.

        Raises:
            ValueError: a layer has another first dimension.
        """
        self.names, tensors = {}, []
        for pattern, found in self._capture.take().items():
            for i, tensor in enumerate(found):
                name = (pattern or "the model") if len(found) == 1 else f"{pattern} {i + 1}"
                if tensor.dim() < 2 or len(tensor) != examples:
                    msg = (
                        f"layers: {self.who}'s {name!r} has the shape {tuple(tensor.shape)}, and the batch {examples} "
                        "examples: a layer must have them as its first dimension; name another one"
                    )
                    raise ValueError(msg)
                self.names.setdefault(pattern, []).append(name)
                tensors.append(tensor)
        return tensors

    def remove(self) -> None:
        """Takes the hooks away."""
        self._capture.remove()


def as_rows(models: Sequence[Sequence[Tensor]], places: torch.Size, kept: Tensor) -> tuple[list[list[Tensor]], bool]:
    """Layers of several models as matrices over the same rows, and whether a row is a position.

    It is where every layer of all of them has the positions of the logits as its first two dimensions: those that
    count. Otherwise a row is an example, with all else as features.

    Args:
        models: the layers of each, (B, ...).
        places: shape of the logits but for their last dimension.
        kept: bool of that shape, the positions that are not padding.
    """
    if len(places) != 2 or not all(x.dim() >= 3 and x.shape[:2] == places for model in models for x in model):
        return [[x.flatten(1) for x in model] for model in models], False
    rows = kept.flatten().nonzero()[:, 0]
    return [[x.flatten(0, 1).flatten(1)[rows.to(x.device)] for x in model] for model in models], True
