"""Gradients of parameters that lie outside a DistributedDataParallel model, averaged as DDP averages its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class GradientAverage:
    """Averages the gradients of ``parameters`` over the ranks of ``model`` at the end of each backward pass.

    One all-reduce after the last gradient, when DDP has started all of its own: every rank calls them in the same
    order. Under ``model.no_sync()`` nothing is exchanged, and the next pass averages what has been accumulated.

    Args:
        model: the student.
        parameters: those that it does not hold; broadcast from rank 0 here, so that they start out equal.
    """

    def __init__(self, model: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
        self.model = model
        self.parameters = list(parameters)
        self._queued = False
        for parameter in self.parameters:
            dist.broadcast(parameter.data, dist.get_global_rank(model.process_group, 0), model.process_group)
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._queue) for p in self.parameters
        ]

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _queue(self, parameter: Tensor) -> None:
        if not self._queued and self.model.require_backward_grad_sync:
            self._queued = True
            queue: Callable[[Callable[[], Any]], None] = torch.autograd.Variable._execution_engine.queue_callback
            queue(self._average)

    def _average(self) -> None:
        self._queued = False
        # A parameter that took no part has a gradient on other ranks perhaps, so that all of them are exchanged.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for dtype in {g.dtype for g in gradients}:
            group = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in group])
            dist.all_reduce(flat, group=self.model.process_group)
            flat /= dist.get_world_size(self.model.process_group)
            for gradient, averaged in zip(group, flat.split([g.numel() for g in group]), strict=True):
                gradient.copy_(averaged.view_as(gradient))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
