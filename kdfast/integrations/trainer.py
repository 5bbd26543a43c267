"""Distillation inside ``transformers.Trainer`` and what derives from it: ``DistillTrainer``, ``DistillTrainerMixin``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kdfast.cache.dataset import collate
from kdfast.distiller import Distiller, Teacher
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD
from kdfast.methods.batch import FIELDS, split_batch
from kdfast.methods.layers import unwrapped
from kdfast.methods.loss import LossLike
from kdfast.methods.positions import count_items, encoder_decoder
from kdfast.methods.projection import Projection

#: Of a checkpoint's folder, with the rank.
STATE = "distiller-{rank}.pt"
#: Fields of a sample that no collator of a trainer knows.
_OWN = ("targets", "id", "index", "weights", "token_mask")
#: What terms are called in the logs of TRL's trainers.
_CALLED = {"accuracy": "mean_token_accuracy", "student_entropy": "entropy"}


class DistillTrainerMixin:
    """A trainer whose objective is a Distiller's: ``class MyTrainer(DistillTrainerMixin, SFTTrainer): pass``.

    Everything else is the trainer's own: data, collators, wrappers, callbacks, checkpoints. What this changes:

    * ``compute_loss`` is the objective of ``losses``, computed inside the wrapped forward pass where there is a head.
    * The denominator is the number of positions that count (:mod:`kdfast.methods.positions`) in all micro-batches of
      all ranks, for every model.
    * The losses' own parameters have an optimizer of the trainer's kind and learning rate, and are clipped, stepped,
      zeroed, saved and resumed with the student's.
    * Columns for the losses stay in the data set, and are collated beside the others.
    * Terms are logged as means since the last log, in training and, after ``eval_``, in evaluation.

    Args:
        args: of the trainer.
        teacher: as for :class:`kdfast.Distiller`; None with a data set of :class:`kdfast.cache.Dataset`.
        losses: as for :class:`kdfast.Distiller`; None: KD at temperature 1, half of it on the labels, with metrics.
        head: whether the student's logits are never made; a :class:`kdfast.methods.Projection`; None: where the model
            has an output embedding.
        teacher_head: likewise of a teacher that is a model.
        causal: logits at position i are compared with the label at i + 1; None: by the model's class.
        unlabelled: as for :class:`kdfast.Distiller`.
        kwargs: of the trainer.

    Raises:
        ValueError: as :class:`kdfast.Distiller` and :func:`kdfast.integrations.huggingface.head_of`; label smoothing by
            the trainer, or parallelism over the sequence.
    """

    model: Any
    args: Any
    accelerator: Any
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | Sequence[Teacher] | None = None,
        losses: Sequence[LossLike] | None = None,
        head: bool | Projection | None = None,
        teacher_head: bool | Projection | None = None,
        causal: bool | None = None,
        unlabelled: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refuse()
        if isinstance(teacher, nn.Module) and not hasattr(teacher, "hf_device_map"):
            teacher.to(self.args.device)
        self.distiller = Distiller(
            self.model,
            teacher,
            [KD(temperature=1.0, alpha=0.5, return_metrics=True)] if losses is None else losses,
            causal=_shifts(self.model) if causal is None else causal,
            unlabelled=unlabelled,
            head=_head(self.model, head),
            teacher_head=_head(teacher, teacher_head) if isinstance(teacher, nn.Module) else None,
            accumulation_steps=self.args.gradient_accumulation_steps,
        )
        self.data_collator = Collator(self.data_collator)
        # The objective has its denominator: neither the accumulation's steps nor the ranks divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._num_tokens = 0.0
        self._own: Any = None  # the optimizer of the losses' parameters
        self._resumed: dict[str, Any] | None = None
        self.add_callback(_Steps(self))  # type: ignore[attr-defined]

    # --- What the trainer calls ---------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and the positions that count in them on all ranks, over the ranks."""
        samples, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        device = self.args.device
        total = torch.zeros((), device=device)
        for batch in samples:
            total = total + self._count(batch).to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total[None]).sum()
        self._num_tokens += float(total)
        return samples, total.clamp(min=1) / self.accelerator.num_processes

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective; in evaluation the mean of the batch."""
        d = self._entered(model)
        inputs = {name: _moved(value, self.args.device) for name, value in inputs.items()}
        inputs.setdefault("use_cache", False)
        if not d.prepared:
            self._make(inputs)
        training = torch.is_grad_enabled()
        loss, terms = d(inputs, num_items=num_items_in_batch if training else None)
        self._keep("train" if training else "eval", terms, self._count(inputs))
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, and the means of the terms since the last time."""
        evaluation = any(name.startswith("eval_") for name in logs)
        sums = self._sums["eval" if evaluation else "train"]
        if sums:
            counted = torch.stack(sums.pop("")).sum()
            names = sorted(sums)
            found = torch.stack([counted, *(torch.stack(sums[name]).sum() for name in names)])
            if self.args.world_size > 1:
                found = self.accelerator.gather(found[None]).sum(0)
            means = (found[1:] / found[0].clamp(min=1e-9)).tolist()
            prefix = "eval_" if evaluation else ""
            logs |= {prefix + name: mean for name, mean in zip(names, means, strict=True)}
            if not evaluation:
                logs["num_tokens"] = self._num_tokens
            sums.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns
        self._signature_columns = [*columns, *(name for name in FIELDS if name not in columns)]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.distiller.prepared:
            step = self.state.global_step  # type: ignore[attr-defined]
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{step}")  # type: ignore[attr-defined]
            own = None if self._own is None else self._own.state_dict()
            state = {"distiller": self.distiller.state_dict(), "optimizer": own, "num_tokens": self._num_tokens}
            torch.save(state, os.path.join(folder, STATE.format(rank=self.args.process_index)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        file = None if checkpoint is None else os.path.join(checkpoint, STATE.format(rank=self.args.process_index))
        if file is not None and os.path.exists(file):
            self._resumed = torch.load(file, map_location="cpu", weights_only=True)

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        if self.args.label_smoothing_factor:
            msg = "label_smoothing_factor has no say here: give KD(label_smoothing=...) or CrossEntropy(label_smoothing=...)"
            raise ValueError(msg)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        for kind in ("cp", "sp"):
            if parallel is not None and getattr(parallel, f"{kind}_enabled", False):
                msg = f"{kind}_size > 1: parts of a sequence on several ranks are not served; shard the model or the batch"
                raise ValueError(msg)

    def _entered(self, model: nn.Module) -> Distiller:
        d = self.distiller
        if d.student is not model:
            if d.entered:
                d.__exit__(None, None, None)
            d.student = model
        if not d.entered:
            d.__enter__()
        return d

    def _make(self, inputs: Mapping[str, Any]) -> None:
        """The losses' parameters, of the first batch, and their optimizer; what was resumed goes in."""
        d = self.distiller
        with torch.random.fork_rng():  # a run that is resumed makes them too, and must go on with the same numbers
            torch.manual_seed(self.args.seed)
            d.prepare(inputs)
        parameters = [p for p in d.parameters() if p.requires_grad]
        if parameters:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)  # type: ignore[attr-defined]
            self._own = self.accelerator.prepare_optimizer(kind(parameters, **options))
        if self._resumed is not None:
            d.load_state_dict(self._resumed["distiller"])
            if self._own is not None:
                self._own.load_state_dict(self._resumed["optimizer"])
            self._num_tokens, self._resumed = self._resumed["num_tokens"], None

    def _count(self, batch: Any) -> Tensor:
        inputs = split_batch(batch)
        two_sided = encoder_decoder(self.model, inputs)
        return count_items(
            inputs, causal=self.distiller.causal, two_sided=two_sided, unlabelled=self.distiller.unlabelled
        )

    def _keep(self, mode: str, terms: Mapping[str, Tensor], count: Tensor) -> None:
        sums = self._sums[mode]
        weight = count.float().to(self.args.device)
        sums[""].append(weight)
        for name, term in terms.items():
            if name != "loss":
                name = _CALLED.get(name.rpartition(".")[2], name)  # noqa: PLW2901
                sums[name].append(term.float().to(weight.device) * weight)


class DistillTrainer(DistillTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with a teacher, see :class:`DistillTrainerMixin`."""


class Collator:
    """A trainer's collator, beside which the columns for the losses are collated.

    Targets of a cache are stacked with the rows of each sample first; the Distiller puts them where the batch's tokens
    are, whichever side is padded.

    Args:
        collator: of the trainer.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, features: list[Any]) -> Any:
        own = {name: [f[name] for f in features] for name in _OWN if isinstance(features[0], Mapping) and name in features[0]}
        rest = [{k: v for k, v in f.items() if k not in own} for f in features] if own else features
        batch = self.collator(rest)
        for name, values in own.items():
            if name == "targets":
                batch[name] = collate([{"targets": one} for one in values])["targets"]
            elif name == "id":
                batch[name] = values
            else:
                batch[name] = torch.as_tensor(values)
        return batch


class _Steps(transformers.TrainerCallback):
    """Steps of the losses' own parameters, beside the trainer's."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = self.trainer._own
        if own is not None and args.max_grad_norm:
            parameters = [p for group in own.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = self.trainer._own
        if own is not None:
            for group in own.param_groups:
                group["lr"] = self.trainer._get_learning_rate()
            own.step()
            own.zero_grad()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.distiller.entered:
            self.trainer.distiller.__exit__(None, None, None)


def _shifts(model: nn.Module) -> bool:
    """Whether a model's logits at position i are of token i + 1: a causal language model's are."""
    inner: Any = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    causal = {*transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    images = {*transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    two_sided = bool(getattr(inner.config, "is_encoder_decoder", False))
    return not two_sided and any(kind.__name__ in causal | images for kind in type(inner).__mro__)


def _head(model: Any, given: bool | Projection | None) -> Projection | None:
    if isinstance(given, Projection):
        return given
    inner: Any = unwrapped(model)
    there = hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None
    if given or (given is None and there):
        return head_of(model)
    return None


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) or hasattr(value, "vocab_size") else value
