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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NEAR = 5  # paths shown where nothing matches


class Pattern(NamedTuple):
    """A pattern's parts."""

    modules: str  # glob of module paths; "": the model itself
    part: str  # "output", "input", or a path inside the output


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
    """The model inside wrappers that put their own name before every path: torch.compile, DataParallel, DDP."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def matching(model: nn.Module, pattern: str, who: str) -> list[str]:
    """Paths of the modules that a pattern names, in the model's order.

    Args:
        model: unwrapped.
        pattern: see the module's docstring.
        who: "student" or "teacher", for the message.

    Raises:
        ValueError: none; names the nearest paths.
    """
    glob = parse(pattern).modules
    shape = re.compile("[^.]*".join(re.escape(piece) for piece in glob.split("*")))
    paths = [path for path, _ in model.named_modules()]
    found = [path for path in paths if shape.fullmatch(path)]
    if not found:
        # Twelve layers that differ in their number are one suggestion, unless a number was asked for.
        known = paths if re.search(r"\d", glob) else list(dict.fromkeys(re.sub(r"\b\d+\b", "*", p) for p in paths))
        near = difflib.get_close_matches(glob, known, NEAR, cutoff=0.3) or [p for p in known if p][:NEAR]
        msg = f"{who} has no layer {pattern!r}; near it: {', '.join(near) or 'none, it has no modules'}"
        raise ValueError(msg)
    return found


class Capture:
    """Forward hooks on one model that keep the tensors of the patterns asked for, until the next forward pass.

    Args:
        model: may be wrapped; its modules are not changed but for the hooks, which ``remove`` takes away.
        patterns: see the module's docstring.
        who: "student" or "teacher", for messages.
        detach: keep tensors without their graph.

    Raises:
        ValueError: a pattern that matches no module.
    """

    def __init__(self, model: nn.Module, patterns: Iterable[str], who: str, *, detach: bool) -> None:
        self.who = who
        self.detach = detach
        self.patterns = tuple(dict.fromkeys(patterns))
        self._kept: dict[str, list[Tensor]] = {pattern: [] for pattern in self.patterns}
        self._handles: list[RemovableHandle] = []
        self._graph = False  # whether the forward pass began with gradients
        inner = unwrapped(model)
        plan = [(pattern, parse(pattern).part, matching(inner, pattern, who)) for pattern in self.patterns]
        if plan:
            self._handles.append(inner.register_forward_pre_hook(self._begin))
        for pattern, part, paths in plan:
            for path in paths:
                hook = self._hook(pattern, part, path)
                self._handles.append(inner.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def take(self) -> Mapping[str, Sequence[Tensor]]:
        """The tensors since the last forward pass began, by pattern; they are let go here.

        Raises:
            RuntimeError: a layer was not run.
        """
        kept, self._kept = self._kept, {pattern: [] for pattern in self.patterns}
        for pattern, tensors in kept.items():
            if not tensors:
                msg = (
                    f"the {self.who}'s layer {pattern!r} was not run since the last loss: run the model first; a model "
                    "that torch.compile had compiled before does not see hooks added later, so enter the Distiller "
                    "before its first call, or call torch._dynamo.reset()"
                )
                raise RuntimeError(msg)
        return kept

    def clear(self) -> None:
        """Lets go of what was captured."""
        self._kept = {pattern: [] for pattern in self.patterns}

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if _recomputing():
            return
        self._graph = torch.is_grad_enabled()
        for tensors in self._kept.values():
            tensors.clear()

    def _hook(self, pattern: str, part: str, path: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if _recomputing():
                return
            if self._graph and not self.detach and not torch.is_grad_enabled():
                msg = (
                    f"the {self.who}'s layer {pattern!r} ({path or 'the model'}) runs without gradient inside a "
                    "forward pass with it, as under checkpointing with use_reentrant=True: pass use_reentrant=False"
                )
                raise RuntimeError(msg)
            if part == "input":
                found = [next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)]
            elif part == "output":
                found = [output[0] if isinstance(output, (tuple, list)) and output else output]
            else:
                try:
                    found = _parts(output, part.split("."))
                except (TypeError, LookupError) as error:
                    msg = f"the {self.who}'s layer {pattern!r}: {error}"
                    raise type(error)(msg) from error
            for tensor in found:
                if not isinstance(tensor, Tensor):
                    msg = (
                        f"the {self.who}'s layer {pattern!r} ({path or 'the model'}) is a {type(tensor).__name__}, "
                        'not a tensor: name the part that is meant after a colon, as in "encoder:last_hidden_state"'
                    )
                    raise TypeError(msg)
                self._kept[pattern].append(tensor.detach() if self.detach else tensor)

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
