"""Layers by path pattern, and their tensors caught by forward hooks.

A pattern names modules by their path, where ``*`` stands for one part of it or within one: ``encoder.layer.*.output``.
It means a module's output, of a tuple the first element. After a colon stands what else is meant: ``fc:input``, the
first input of ``fc``; ``encoder:1``, or ``encoder:hidden_states.*``, a part of what it returned; ``:attentions.*``, a
part of what the whole model returned. ``*`` gives several tensors, in the order of the forward pass.

Losses that compare layers take several patterns as well, in a sequence or in braces: ``layer.*.self.{query,key}``.
"""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NEAR = 5  # paths shown where nothing matches
#: Parts of a path that wrappers of a module put in: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


#: What an encoder-decoder model of transformers calls the attention of its decoder to its encoder, and there what
#: is computed from the encoder's states.
_CROSS = ("EncDecAttention", "encoder_attn", "crossattention", "multihead_attn")
_OF_SOURCE = ("k", "v", "key", "value", "k_proj", "v_proj")


class Pattern(NamedTuple):
    """A pattern's parts."""

    modules: str  # glob of module paths; "": the model itself
    part: str  # "output", "input", or a path inside the output

    @property
    def of_source(self) -> bool:
        """Whether an encoder-decoder model's layer has the source's tokens, by its name."""
        if not self.modules:
            return self.part.startswith("encoder_")
        path = self.modules.split(".")
        side = next((name for name in path if name in ("encoder", "decoder")), None)
        cross = path[-1] in _OF_SOURCE and any(name in _CROSS for name in path)
        return side == "encoder" or cross


def parse(pattern: str) -> Pattern:
    """Splits a pattern at its colon."""
    modules, colon, part = pattern.partition(":")
    if colon and not part:
        msg = f'layer {pattern!r} ends in a colon: name a part, as in "fc:input" or ":attentions.*"'
        raise ValueError(msg)
    return Pattern(modules, part or "output")


def expand(patterns: str | Sequence[str], who: str) -> tuple[str, ...]:
    """The patterns of a sequence or of alternatives in braces, in the order in which they are written.

    Args:
        patterns: one or several.
        who: the argument's name, for messages.

    Raises:
        TypeError: something else than strings.
        ValueError: no pattern, or braces that do not pair or lie in others.

    Example:
        >>> expand("fc.{query,key}", "student")
        ('fc.query', 'fc.key')
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Sequence) else []
    wrong = next((type(one).__name__ for one in given if not isinstance(one, str)), None)
    if wrong or not isinstance(patterns, Sequence):
        msg = f'{who} must name layers by path patterns, as "encoder.layer.*", got {wrong or type(patterns).__name__}'
        raise TypeError(msg)
    found: list[str] = []
    while given:
        pattern = given.pop(0)
        braces = re.search(r"\{([^{}]*)\}", pattern)
        if braces and "{" not in pattern[: braces.start()]:
            given[:0] = [pattern[: braces.start()] + one + pattern[braces.end() :] for one in braces[1].split(",")]
        elif "{" in pattern or "}" in pattern:
            msg = (
                f"{who} {pattern!r} has a brace without its other or within others: write alternatives as {{query,key}}"
            )
            raise ValueError(msg)
        else:
            found.append(pattern)
    if not found:
        msg = f'{who} names no layer: give a path pattern, as "encoder.layer.*"'
        raise ValueError(msg)
    return tuple(found)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that put their own name before every path.

    Those of torch.compile, DataParallel, DistributedDataParallel, FullyShardedDataParallel, activation checkpointing
    and DeepSpeed's engine.
    """
    while not isinstance(model, torch.jit.ScriptModule):
        inner = next((m for name in _WRAPPERS if (m := model._modules.get(name)) is not None), None)
        engine = type(model).__name__ == "DeepSpeedEngine"
        if inner is None and (engine or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))):
            inner = model._modules["module"]
        if inner is None:
            break
        model = inner
    return model


def by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their path without the parts that wrappers put into it; of a wrapped one the outermost wrapper.

    Args:
        model: unwrapped.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        found.setdefault(own_path(path), module)
    return found


def own_path(path: str) -> str:
    """A path without the parts that wrappers of single modules put into it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def matching(model: nn.Module, pattern: str, who: str) -> list[str]:
    """Paths of the modules that a pattern names, as :func:`by_path` has them, in the model's order.

    Args:
        model: unwrapped.
        pattern: see the module's docstring.
        who: "student" or "teacher", for the message.

    Raises:
        ValueError: none; names the nearest paths.
    """
    glob = parse(pattern).modules
    shape = re.compile("[^.]*".join(re.escape(piece) for piece in glob.split("*")))
    paths = list(by_path(model))
    found = [path for path in paths if shape.fullmatch(path)]
    if not found:
        # Twelve layers that differ in their number are one suggestion, unless a number was asked for.
        known = paths if re.search(r"\d", glob) else list(dict.fromkeys(re.sub(r"\b\d+\b", "*", p) for p in paths))
        near = difflib.get_close_matches(glob, known, NEAR, cutoff=0.3) or [p for p in known if p][:NEAR]
        msg = f"{who} has no layer {pattern!r}; near it: {', '.join(near) or 'none, it has no modules'}"
        raise ValueError(msg)
    return found


class Hook:
    """A forward hook or pre-hook that is the module's it was registered on: a copy of the module has a silent one.

    ``copy.deepcopy``, ``AveragedModel`` and pickles take a module's hooks along, whose calls are meant for it alone.

    Args:
        call: what the hook does.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Kept(NamedTuple):
    """A tensor that a hook saw."""

    tensor: Tensor
    version: int | None  # of the tensor then; None where it is not counted
    path: str


class _Store:
    """What the hooks of one model write to. They hold it alone, so that who gave up a Capture leaves nothing behind."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.kept: dict[str, list[Kept]] = {pattern: [] for pattern in patterns}
        self.graph = False  # whether the forward pass began with gradients
        self.active = True  # a compiled graph goes on calling hooks that were taken away


class Capture:
    """Forward hooks on one model that keep the tensors of the patterns asked for, until the next forward pass.

    Args:
        model: may be wrapped; its modules are not changed but for the hooks, which ``remove`` takes away, and so does
            the end of this object.
        patterns: see the module's docstring.
        who: "student" or "teacher", for messages.
        detach: keep tensors without their graph.

    Raises:
        ValueError: a pattern that matches no module, or layers of both sides of an encoder-decoder model; a model in
            DataParallel, whose replicas each see a part of the batch.
    """

    def __init__(self, model: nn.Module, patterns: Iterable[str], who: str, *, detach: bool) -> None:
        self.who = who
        self.detach = detach
        self.patterns = tuple(dict.fromkeys(patterns))
        self._store = _Store(self.patterns)
        handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove, handles, self._store)
        inner = unwrapped(model)
        plan = [(pattern, parse(pattern).part, matching(inner, pattern, who)) for pattern in self.patterns]
        if not plan:
            return
        if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules()):
            msg = (
                f"the {who} is in DataParallel, whose replicas would each keep the layers of their own samples: use "
                "DistributedDataParallel, or losses of logits alone"
            )
            raise ValueError(msg)
        two_sided = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
        modules = by_path(inner)
        handles.append(inner.register_forward_pre_hook(Hook(_begin(self._store))))
        for pattern, part, paths in plan:
            if two_sided and len({Pattern(path, part).of_source for path in paths}) > 1:
                msg = f"the {who}'s layer {pattern!r} is of the encoder and of the decoder: name one of them"
                raise ValueError(msg)
            for path in paths:
                hook = Hook(_keep(self._store, pattern, part, path, who, detach))
                module = modules[path]
                if part == "input":  # before the module runs, which may change it in place
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def take(self) -> Mapping[str, Sequence[Tensor]]:
        """The tensors since the last forward pass began, by pattern; they are let go here.

        Raises:
            RuntimeError: a layer was not run, or its tensor was changed in place afterwards.
        """
        kept = self._store.kept
        self.clear()
        for pattern, found in kept.items():
            if not found:
                msg = (
                    f"the {self.who}'s layer {pattern!r} was not run since the last loss: run the model first; a model "
                    "that torch.compile had compiled before does not see hooks added later, so enter the Distiller "
                    "before its first call, or call torch._dynamo.reset()"
                )
                raise RuntimeError(msg)
            for tensor, version, path in found:
                if version is not None and tensor._version != version:
                    msg = (
                        f"the {self.who}'s layer {pattern!r} ({path or 'the model'}) was changed in place after it "
                        "ran, as by ReLU(inplace=True) behind it: name the layer that changed it, whose output this is "
                        "now, or build it with inplace=False"
                    )
                    raise RuntimeError(msg)
        return {pattern: [one.tensor for one in found] for pattern, found in kept.items()}

    def clear(self) -> None:
        """Lets go of what was captured."""
        self._store.kept = {pattern: [] for pattern in self.patterns}

    def remove(self) -> None:
        """Takes the hooks away."""
        self._finalizer()
        self.clear()


def _remove(handles: list[RemovableHandle], store: _Store) -> None:
    store.active = False
    for handle in handles:
        handle.remove()
    handles.clear()


def _begin(store: _Store) -> Callable[..., None]:
    def begin(module: nn.Module, args: Any) -> None:
        if not store.active or _recomputing():
            return
        store.graph = torch.is_grad_enabled()
        for found in store.kept.values():
            found.clear()

    return begin


def _keep(store: _Store, pattern: str, part: str, path: str, who: str, detach: bool) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if not store.active or _recomputing():
            return
        if store.graph and not detach and not torch.is_grad_enabled():
            msg = (
                f"the {who}'s layer {pattern!r} ({path or 'the model'}) runs without gradient inside a "
                "forward pass with it, as under checkpointing with use_reentrant=True: pass use_reentrant=False"
            )
            raise RuntimeError(msg)
        if part == "input":
            found = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1] or [None]  # type: ignore[list-item]
        elif part == "output":
            found = [output[0] if isinstance(output, (tuple, list)) and output else output]
        else:
            try:
                found = _parts(output, part.split("."))
            except (TypeError, LookupError) as error:
                msg = f"the {who}'s layer {pattern!r}: {error}"
                raise type(error)(msg) from error
        for tensor in found:
            if not isinstance(tensor, Tensor):
                msg = (
                    f"the {who}'s layer {pattern!r} ({path or 'the model'}) is a {type(tensor).__name__}, "
                    'not a tensor: name the part that is meant after a colon, as in "encoder:last_hidden_state"'
                )
                raise TypeError(msg)
            tensor = tensor.detach() if detach else tensor  # noqa: PLW2901
            if torch.compiler.is_compiling():  # where versions are not told, and a copy that nobody changes is none
                kept = Kept(tensor.clone(), None, path)
            else:
                kept = Kept(tensor, None if tensor.is_inference() else tensor._version, path)
            store.kept[pattern].append(kept)

    return keep


def _recomputing() -> bool:
    """Whether this is the backward pass: a layer that checkpointing runs again there is not one layer more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _parts(value: Any, path: Sequence[str]) -> list[Any]:
    """What a path inside an output leads to: attributes, keys and positions; ``*`` every element."""
    if not path:
        return [value]
    name, rest = path[0], path[1:]
    if name == "*":
        if not isinstance(value, (tuple, list, Mapping)):
            msg = f"* stands for the elements of a tuple or list, not of a {type(value).__name__}"
            raise TypeError(msg)
        elements = value.values() if isinstance(value, Mapping) else value
        return [part for element in elements for part in _parts(element, rest)]
    if isinstance(value, Mapping) and name in value:
        return _parts(value[name], rest)
    if isinstance(value, (tuple, list)) and re.fullmatch(r"-?\d+", name):
        return _parts(value[int(name)], rest)
    found = getattr(value, name, None)
    if found is None:
        there = ", ".join(value) if isinstance(value, Mapping) else type(value).__name__
        msg = (
            f"the output has no {name!r} ({there}): a transformer gives hidden_states and attentions where it is "
            "configured with output_hidden_states=True and output_attentions=True"
        )
        raise LookupError(msg)
    return _parts(found, rest)
