"""Distillation inside a ``LightningModule``: ``DistillMixin``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.distiller import Distiller
from kdfast.integrations.means import Means
from kdfast.integrations.models import is_causal
from kdfast.methods import KD
from kdfast.methods.given import Teacher
from kdfast.methods.loss import LossLike


class DistillMixin:
    """A LightningModule whose objective is a Distiller's: ``class Lit(DistillMixin, LightningModule)``.

    Its ``__init__`` calls :meth:`distil`; training and validation steps are here, optimizers stay its own.

    * The objective of an optimizer step is the sum over all positions that count (:mod:`kdfast.methods.positions`), of
      all its batches on all ranks, over their number. That is not known before the last batch, so that each backward
      pass is of a sum over a constant, and ``on_before_optimizer_step``, before gradients are clipped, scales what has
      been accumulated.
    * Teachers are no part of the module: neither of its ``state_dict`` nor of what a strategy wraps. Whether they are
      in eval mode does not depend on ``train()``.
    * The losses' own parameters are the same on all ranks, and their state is in every checkpoint.
    * Terms are logged as ``train/kd.soft`` and ``val/kd.soft``, weighted by what counts, over all ranks;
      of several loaders as ``val/0/kd.soft``.
    * A schedule's step is the trainer's ``global_step``.

    A module that overrides ``on_fit_start``, ``on_before_optimizer_step``, ``teardown`` or the hooks of checkpoints
    calls them of ``super()`` as well.

    Attributes:
        distiller: the :class:`kdfast.Distiller`.

    Example:
        >>> class Lit(DistillMixin, LightningModule):  # doctest: +SKIP
        ...     def __init__(self, student, teacher):
        ...         super().__init__()
        ...         self.student = student
        ...         self.distil(student, teacher, [KD()])
        ...     def configure_optimizers(self):
        ...         return AdamW([*self.student.parameters(), *self.distiller.parameters()])
    """

    trainer: Any

    def distil(
        self,
        student: nn.Module,
        teacher: Teacher | Sequence[Teacher] | None,
        losses: Sequence[LossLike] | None = None,
        *,
        example: Any = None,
        causal: bool | None = None,
        **options: Any,
    ) -> None:
        """Says what is distilled into what; to be called in ``__init__``.

        Args:
            student: a part of this module.
            teacher: as for :class:`kdfast.Distiller`.
            losses: likewise; None: ``KD(temperature=1.0, alpha=0.5, return_metrics=True)``.
            example: a batch, from whose shapes the losses' parameters follow; None where they need none.
            causal: as for :class:`kdfast.Distiller`; None: where the student is a causal language model of
                transformers.
            options: of :class:`kdfast.Distiller`.

        Raises:
            ValueError: as :class:`kdfast.Distiller`; losses whose parameters follow from shapes, without an example.
        """
        if losses is None:
            losses = [KD(temperature=1.0, alpha=0.5, return_metrics=True)]
        causal = is_causal(student) if causal is None else causal
        self.distiller = d = Distiller(student, teacher, losses, causal=causal, **options)
        if not d.prepared and example is None:
            names = ", ".join(name for name, loss in d.losses.items() if not loss.prepared)
            msg = f"the parameters of {names} follow from a batch's shapes: give distil(example=) one"
            raise ValueError(msg)
        with d:  # so that a layer that is not there is named here, and not at the first batch
            if not d.prepared:
                d.prepare(example)
        self._constant = 0.0  # the same for all batches and ranks
        self._counted: Tensor | None = None  # since the last optimizer step
        self._means: dict[tuple[str, int], Means] = {}  # of a stage and a loader

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The objective of a batch, to be differentiated."""
        return self._objective(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The objective of a batch, a mean."""
        return self._objective(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The objective of a batch, a mean."""
        return self._objective(batch, "test", dataloader_idx)

    # --- What the trainer calls ---------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuses what would scale gradients otherwise, and parameters of the losses that nothing would train."""
        if not hasattr(self, "distiller"):
            msg = f"{type(self).__name__} says nowhere what is distilled: call self.distil(...) in __init__"
            raise RuntimeError(msg)
        if type(self.trainer.strategy).__name__.startswith("DeepSpeed"):
            msg = "DeepSpeed's strategy keeps the gradients to itself: use DDP, FSDP, or transformers' Trainer"
            raise ValueError(msg)
        if not self.automatic_optimization:  # type: ignore[attr-defined]
            msg = "with automatic_optimization=False call a kdfast.Distiller in your own training_step"
            raise ValueError(msg)
        trained = {p for optimizer in self.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        if any(p.requires_grad and p not in trained for p in self.distiller.parameters()):
            msg = "configure_optimizers leaves out parameters of the losses: add *self.distiller.parameters()"
            raise ValueError(msg)
        self._counted = None  # of a run that was broken off
        self._means.clear()
        super().on_fit_start()  # type: ignore[misc]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of sums over a constant become those of the mean over all that counts."""
        total = self._total(self._counted)  # type: ignore[arg-type]
        # Gradients were averaged over the ranks.
        factor = self.trainer.world_size * self._constant / torch.where(total > 0, total, 1.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    (gradient.to_local() if hasattr(gradient, "to_local") else gradient).mul_(factor)
        self._counted = None
        every = self.trainer.log_every_n_steps  # 0: never
        if every and (self.trainer.global_step + 1) % every == 0:
            self._log("train")
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]

    def on_validation_epoch_end(self) -> None:
        """Logs the terms' means."""
        self._log("val")
        super().on_validation_epoch_end()  # type: ignore[misc]

    def on_test_epoch_end(self) -> None:
        """Logs the terms' means."""
        self._log("test")
        super().on_test_epoch_end()  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The losses' state goes along."""
        checkpoint["distiller"] = self.distiller.state_dict()
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back."""
        if "distiller" in checkpoint:
            self.distiller.load_state_dict(checkpoint["distiller"])
        else:
            warnings.warn("the checkpoint has no state of a Distiller: losses and schedules begin anew", stacklevel=2)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    def teardown(self, stage: str) -> None:
        """Takes the hooks off the models."""
        if self.distiller.entered:
            self.distiller.__exit__(None, None, None)
        super().teardown(stage)  # type: ignore[misc]

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _objective(self, batch: Any, stage: str, loader: int = 0) -> Tensor:
        d = self.distiller
        if not d.entered:
            for teacher in d.teachers:
                if isinstance(teacher, nn.Module):
                    teacher.to(self.device)  # type: ignore[attr-defined]
            d.__enter__()
        count = d.count_items(batch).float()
        if stage != "train":
            loss, terms = d(batch, num_items=torch.where(count > 0, count, 1.0))
        else:
            d.number = self.trainer.global_step
            if not self._constant:
                self._constant = self.trainer.strategy.broadcast(max(float(count), 1.0))
            self._counted = count if self._counted is None else self._counted + count
            loss, terms = d(batch, num_items=self._constant)
            loss = loss * self.trainer.accumulate_grad_batches  # by which the trainer divides
            terms["loss"] = (
                terms["loss"] * self._constant / torch.where(count > 0, count, 1.0)
            )  # of this batch, as the others
        self._means.setdefault((stage, loader), Means(d)).add(terms, batch)
        return loss

    def _total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        total: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return total

    def _log(self, stage: str) -> None:
        loaders = sorted(loader for kind, loader in self._means if kind == stage)
        for loader in loaders:
            which = f"{stage}/{loader}" if len(loaders) > 1 else stage
            for name, mean in self._means[stage, loader].take(self._total).items():
                self.log(f"{which}/{name}", mean, prog_bar=name == "loss")  # type: ignore[attr-defined]
