"""Gradients of parameters that lie outside a wrapped model, averaged over its ranks as the wrapper averages its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


def data_parallel_groups(model: nn.Module) -> list[Any]:
    """The process groups over whose ranks a model sees different samples; none where it is on one rank alone.

    Of DistributedDataParallel, around the model or, inside its forward pass, around what the model is a part of; of
    FullyShardedDataParallel, ``fully_shard`` (every axis of its mesh) and DeepSpeed's engine or ZeRO-3 parameters.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    outer = DistributedDataParallel._get_active_ddp_module()
    for module in (model, *model.modules(), outer):
        if isinstance(module, DistributedDataParallel):
            return [module.process_group]
        if module is not None and "_fsdp_wrapped_module" in module._modules:
            across: Any = getattr(module, "_inter_node_pg", None)  # of hybrid sharding
            return [module.process_group, *([] if across is None else [across])]
        if type(module).__name__ == "DeepSpeedEngine":
            return [getattr(module, "data_parallel_group", None) or dist.group.WORLD]
    for parameter in model.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)  # of a DTensor
        if mesh is not None:
            return [mesh.get_group(axis) for axis in range(mesh.ndim)]
        if hasattr(parameter, "ds_id"):
            return [getattr(parameter, "ds_process_group", None) or dist.group.WORLD]
    return []


def reshard(model: nn.Module) -> None:
    """Shards again what a forward pass without a backward pass has left whole of a model of ``fully_shard``.

    Its ``parameters()`` are others until then, with which an optimizer would train nothing.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class GradientAverage:
    """Averages the gradients of ``parameters`` over the ranks of some groups at the end of each backward pass.

    One all-reduce a group after the last gradient, when a wrapper has started all of its own: every rank calls them in
    the same order. Under gradient accumulation each pass averages what has been accumulated, which is the average of
    what the passes bring: ``no_sync()`` of a wrapper needs no heed.

    Args:
        groups: one for each axis over which ranks see different samples.
        parameters: those that the wrapped model does not hold; broadcast from the first rank here, so that they start
            out equal.
    """

    def __init__(self, groups: Sequence[Any], parameters: Sequence[Tensor]) -> None:
        self.groups = list(groups)
        self.parameters = list(parameters)
        self._queued = False
        for parameter in self.parameters:
            for group in self.groups:
                dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group)
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._queue) for p in self.parameters
        ]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _queue(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            queue: Callable[[Callable[[], Any]], None] = torch.autograd.Variable._execution_engine.queue_callback
            queue(self._average)

    def _average(self) -> None:
        self._queued = False
        # A parameter that took no part has a gradient on other ranks perhaps, so that all of them are exchanged.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for dtype in dict.fromkeys(g.dtype for g in gradients):  # in one order on all ranks
            group = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in group])
            for ranks in self.groups:
                dist.all_reduce(flat, group=ranks)
                flat /= dist.get_world_size(ranks)
            for gradient, averaged in zip(group, flat.split([g.numel() for g in group]), strict=True):
                gradient.copy_(averaged.view_as(gradient))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
