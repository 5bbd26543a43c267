"""Distillation inside ``transformers.Trainer`` and what derives from it."""

from __future__ import annotations

import glob
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from kdfast.cache.reader import Reader
from kdfast.distiller import Distiller
from kdfast.integrations.collator import OWN, Collator
from kdfast.integrations.huggingface import WithoutAdapters
from kdfast.integrations.means import Means
from kdfast.integrations.models import head_for, in_place, is_causal
from kdfast.integrations.own_optimizer import OwnOptimizer
from kdfast.integrations.repeats import without_repeats
from kdfast.methods import KD
from kdfast.methods.batch import FIELDS, Inputs, split_batch
from kdfast.methods.given import Teacher
from kdfast.methods.layers import unwrapped
from kdfast.methods.loss import LossLike
from kdfast.methods.positions import arguments, encoder_decoder
from kdfast.methods.projection import Projection

#: The first version whose trainer counts a step's items before its forward passes and leaves the division to the loss.
OLDEST = (4, 50)
#: In a checkpoint's folder, one a rank.
STATE = "distiller-{rank}.pt"

#: One teacher or several, or a function that makes it of the trainer's student.
Given: TypeAlias = Teacher | Sequence[Teacher] | Callable[[nn.Module], Teacher]


class DistillTrainerMixin:
    """A trainer whose objective is a Distiller's: ``class MyTrainer(DistillTrainerMixin, SFTTrainer): pass``.

    For ``transformers.Trainer``, ``Seq2SeqTrainer``, TRL's ``SFTTrainer`` and what derives from them. Data, collators,
    wrappers, callbacks and checkpoints stay the trainer's own. What is another:

    * The loss is the objective of ``losses``, computed inside the wrapped forward pass where there is a head. Neither
      ``labels`` nor ``num_items_in_batch`` are passed to the student, which computes no loss itself.
    * It is the sum over all positions that count (:mod:`kdfast.methods.positions`) of an optimizer step, in all its
      micro-batches and on all ranks, over their number: whatever the model, ``gradient_accumulation_steps``,
      ``average_tokens_across_devices`` and the lengths of the samples.
    * The losses' own parameters have an optimizer of their own (:meth:`create_own_optimizer`), and are saved and
      resumed with each checkpoint; a resumed run is the uninterrupted one, bit for bit.
    * The columns ``targets`` (:class:`kdfast.cache.Dataset`), ``id`` (with a :class:`kdfast.cache.Reader` as the
      teacher), ``weights``, ``token_mask`` and ``index`` stay in the data set.
    * Each term of the losses is logged, as ``kd.soft``: its mean since the last log over all that counts on all ranks,
      with ``entropy`` (nats), ``mean_token_accuracy`` and ``num_tokens``; ``eval_kd.soft`` and so on in evaluation,
      where ``eval_loss`` is the mean over all that counts, too. A sample that is repeated to fill the ranks' last
      batches counts once, where rows of a batch are samples of a map-style data set.
    * A schedule's step is the trainer's ``global_step``.

    Args:
        args: of the trainer.
        teacher: as for :class:`kdfast.Distiller`, or a function of the student that the trainer has made, such as
            :class:`kdfast.integrations.huggingface.WithoutAdapters`; None where the samples have ``targets``. A model
            is moved to the trainer's device, but for one that is dispatched, quantised or sharded already.
        losses: as for :class:`kdfast.Distiller`; None: ``KD(temperature=1.0, alpha=0.5, return_metrics=True)``.
        head: the student's output projection, so that its logits are never made; True: that of the model; False: the
            model's own logits; None: True where the model has an output embedding and every loss is kdfast's own.
        teacher_head: likewise of the teachers.
        causal: logits at position i are compared with the label at i + 1; None: where the model is a causal language
            model of transformers.
        unlabelled: as for :class:`kdfast.Distiller`.
        kwargs: of the trainer.

    Attributes:
        distiller: the :class:`kdfast.Distiller`.

    Raises:
        ValueError: as :class:`kdfast.Distiller` and :func:`kdfast.integrations.huggingface.head_of`; options of the
            trainer that say what the loss is (``compute_loss_func``, ``label_smoothing_factor``, ``loss_type``);
            tensor, context or sequence parallelism; ``model_init``; fp16 of DeepSpeed beside losses with parameters.
        ImportError: a transformers older than 4.50.

    Example:
        >>> from kdfast.integrations.trainer import DistillTrainer
        >>> trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=data)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    model: Any
    args: Any
    accelerator: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        teacher: Given | None = None,
        losses: Sequence[LossLike] | None = None,
        head: bool | Projection | None = None,
        teacher_head: bool | Projection | Sequence[Projection | None] | None = None,
        causal: bool | None = None,
        unlabelled: int | None = None,
        **kwargs: Any,
    ) -> None:
        _check_version()
        super().__init__(*args, **kwargs)
        self._refuse()
        teachers = _teachers(teacher, self.model)
        for one in teachers:
            if isinstance(one, nn.Module) and not in_place(one):
                one.to(self.args.device)
        losses = [KD(temperature=1.0, alpha=0.5, return_metrics=True)] if losses is None else losses
        given_heads = teacher_head if isinstance(teacher_head, (list, tuple)) else [teacher_head] * len(teachers)
        if len(given_heads) != len(teachers):
            msg = f"teacher_head must be one for each of the {len(teachers)} teachers, got {len(given_heads)}"
            raise ValueError(msg)
        if not (causal is None or isinstance(causal, bool)):
            msg = f"causal must be True, False or None, got {type(causal).__name__}"
            raise TypeError(msg)
        heads = [head_for("teacher_head", *pair, losses) for pair in zip(teachers, given_heads, strict=True)]
        self.distiller = Distiller(
            self.model,
            teachers,
            losses,
            causal=is_causal(self.model) if causal is None else causal,
            unlabelled=unlabelled,
            head=head_for("head", self.model, head, losses),
            teacher_head=heads or None,
        )
        with self.distiller:  # so that a layer that is not there is named here, and not at the first batch
            pass
        self._two_sided = encoder_decoder(self.model, Inputs())
        keyed = any(isinstance(one, Reader) for one in teachers)
        self.data_collator = Collator(self.data_collator, two_sided=self._two_sided, keyed=keyed)
        # The objective has its denominator: the trainer divides by neither the accumulation's steps nor the ranks.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._means = {"train": Means(self.distiller), "eval": Means(self.distiller)}
        self._num_tokens = torch.zeros((), dtype=torch.int64)
        self._own = OwnOptimizer(self)
        self._resumed: dict[str, Any] | None = None
        self._warned = False
        self.add_callback(self._own)  # type: ignore[attr-defined]

    def create_own_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the losses' own parameters: of the kind that ``args.optim`` names. To be overridden.

        Args:
            parameters: of projectors, learned temperatures and so on.
        """
        kind, options = self.get_optimizer_cls_and_kwargs(self.args)  # type: ignore[attr-defined]
        made: torch.optim.Optimizer = kind(parameters, **{"weight_decay": self.args.weight_decay, **options})
        return made

    # --- What the trainer calls ---------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; afterwards the models are without hooks again."""
        self._means["train"].clear()  # of a run that was broken off
        self._own.zero_grad()
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._leave()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and the positions that count in them on all ranks, over the ranks."""
        samples, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        device = self.args.device
        found = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        for batch in samples:
            found[0] += self.distiller.count_items(self._renamed(batch)).to(device)
            found[1] += _input_tokens(batch)
        if samples and not self._warned and split_batch(self._renamed(samples[0])).labels is None:
            self._warned = True
            hard = [name for name, loss in self.distiller.losses.items() if getattr(loss, "alpha", 1.0) != 1.0]
            if hard:
                warnings.warn(f"batches have no labels: of {', '.join(hard)} the teacher's term is left", stacklevel=2)
        counted, tokens = self._total(found)
        self._num_tokens = self._num_tokens.to(device) + tokens.round().long()
        # A gradient is averaged over the ranks afterwards.
        return samples, torch.where(counted > 0, counted, 1.0).float() / self.args.world_size

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective: of a step's share in training, the mean of the batch in evaluation.

        ``return_outputs`` gives what the student returns, too, of another forward pass where there is a head.
        """
        inputs = {name: _moved(value, self.args.device) for name, value in self._renamed(inputs).items()}
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            inputs["use_cache"] = False  # keys and values that nobody asks for again
        training = torch.is_grad_enabled()
        with self.accelerator.autocast():  # of the teacher, which the accelerator has not wrapped
            d = self._entered(model)
            self._make_ready(inputs)
            seen: list[Any] = []
            asked = return_outputs and d.head is None
            hook = model.register_forward_hook(lambda module, args, out: seen.append(out)) if asked else None
            if training:
                d.number = self.state.global_step  # type: ignore[attr-defined]
            else:
                counted = d.count_items(inputs)
                num_items_in_batch = torch.where(counted > 0, counted, 1.0)
            try:
                loss, terms = d(inputs, num_items=num_items_in_batch)
            finally:
                if hook is not None:
                    hook.remove()
            self._means["train" if training else "eval"].add(terms, inputs)
            if not return_outputs:
                return loss
            if asked:
                return loss, seen[0]
            split = split_batch(inputs)
            with torch.no_grad():
                return loss, model(*split.args, **arguments(model, split, d.unlabelled))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Tensor, Any, Any]:
        """The objective of one batch, with labels or without; logits, or generated tokens, where they are asked for."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        generate = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        theirs = {name: value for name, value in inputs.items() if name not in OWN}
        if self._two_sided and split_batch(inputs).labels is None and "decoder_input_ids" not in inputs:
            # Nothing that the decoder could be taught on: tokens to be generated alone.
            return super().prediction_step(  # type: ignore[misc, no-any-return]
                model, theirs, prediction_loss_only, ignore_keys=ignore_keys, **generation
            )
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            wanted = not (prediction_loss_only or generate)
            counted = without_repeats(self._renamed(inputs), self.accelerator, two_sided=self._two_sided)
            found = self.compute_loss(model, counted, return_outputs=wanted)
            loss, outputs = found if wanted else (found, None)
        if prediction_loss_only:
            return loss, None, None
        if generate:
            _, predicted, labels = super().prediction_step(  # type: ignore[misc]
                model, theirs, prediction_loss_only, ignore_keys=ignore_keys, **generation
            )
            return loss, predicted, labels
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [])
        names = self.label_names  # type: ignore[attr-defined]
        labels = tuple(inputs.get(name) for name in names)
        logits = (
            tuple(value for name, value in outputs.items() if name not in (*ignore_keys, "loss"))
            if isinstance(outputs, Mapping)
            else outputs
        )
        return loss, _one_or_all(logits), None if any(one is None for one in labels) else _one_or_all(labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with the terms' means among the metrics."""
        training, means = self.distiller.entered, self._means["eval"]
        means.clear()
        try:
            output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            if not training:
                self._leave()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": mean for name, mean in means.take(self._total).items()})
        output.metrics[f"{prefix}_num_tokens"] = int(self._num_tokens)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, in training with the means of the terms since the last time."""
        if "loss" in logs:
            terms = self._means["train"].take(self._total)
            logs |= {name: mean for name, mean in terms.items() if name != "loss"}
            logs["num_tokens"] = int(self._num_tokens)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        d = getattr(self, "distiller", None)
        more = dict.fromkeys(FIELDS)  # and what a teacher takes that the student does not
        for teacher in () if d is None else d.teachers:
            if isinstance(teacher, nn.Module):
                more |= dict.fromkeys(inspect.signature(unwrapped(teacher).forward).parameters)
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *more])]

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
        if not self.args.save_only_model:
            step = self.state.global_step  # type: ignore[attr-defined]
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{step}")  # type: ignore[attr-defined]
            os.makedirs(folder, exist_ok=True)
            state = {
                "distiller": self.distiller.state_dict(),
                "optimizer": self._own.state_dict(),
                "num_tokens": int(self._num_tokens),
            }
            torch.save(state, os.path.join(folder, STATE.format(rank=self.args.process_index)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        file = os.path.join(checkpoint, STATE.format(rank=self.args.process_index))
        if not os.path.exists(file):
            others = sorted(glob.glob(os.path.join(glob.escape(checkpoint), STATE.format(rank="*"))))
            what = f"rank {self.args.process_index} takes that of {others[0]}" if others else "they begin anew"
            msg = f"{file} is not there, with the losses' state (parameters, schedules' step) of this rank: {what}"
            warnings.warn(msg, stacklevel=2)
            if not others:
                return
            file = others[0]
        self._resumed = torch.load(file, map_location="cpu", weights_only=True)
        self._num_tokens = torch.tensor(self._resumed["num_tokens"])

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        file = os.path.join(best, STATE.format(rank=self.args.process_index))
        if os.path.exists(file):
            self.distiller.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["distiller"])

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        options = {
            "compute_loss_func": getattr(self, "compute_loss_func", None) is not None,
            "label_smoothing_factor": bool(self.args.label_smoothing_factor),
            "loss_type": getattr(self.args, "loss_type", "nll") != "nll",
        }
        for name, given in options.items():
            if given:
                msg = f"{name} has no say here, the losses are a Distiller's: losses=[KD(label_smoothing=...), ...]"
                raise ValueError(msg)
        if getattr(self, "model_init", None) is not None:
            msg = "model_init makes another student than the one that head and losses are of: give model"
            raise ValueError(msg)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
            if parallel is not None and getattr(parallel, f"{kind}_enabled", False):
                msg = f"{name} parallelism ({kind}_size > 1) is not served: shard the parameters, by FSDP or ZeRO"
                raise ValueError(msg)

    def _entered(self, model: nn.Module) -> Distiller:
        """The Distiller, inside its context, of the model as it is wrapped now: in evaluation it may not be."""
        d = self.distiller
        if d.student is not model:
            self._leave()
            for teacher in d.teachers:
                if isinstance(teacher, WithoutAdapters) and unwrapped(teacher.student) is unwrapped(model):
                    teacher.student = model
            d.student = model
        if not d.entered:
            d.__enter__()
        return d

    def _leave(self) -> None:
        if self.distiller.entered:
            self.distiller.__exit__(None, None, None)

    def _make_ready(self, inputs: Mapping[str, Any]) -> None:
        """The losses' parameters, of the first batch, and their optimizer; what was resumed goes in."""
        d, own = self.distiller, self._own
        if not d.prepared:
            device = self.args.device
            # A run that is resumed makes them too, and must go on with the same numbers.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.args.seed)
                d.prepare(inputs)
        if own.optimizer is None:
            parameters = [p for p in d.parameters() if p.requires_grad]
            if parameters and self.is_deepspeed_enabled and self.accelerator.mixed_precision == "fp16":  # type: ignore[attr-defined]
                msg = "DeepSpeed scales fp16 gradients by a factor that the losses' own parameters never see: use bf16"
                raise ValueError(msg)
            own.optimizer = self.create_own_optimizer(parameters) if parameters else None
        if self._resumed is not None:
            d.load_state_dict(self._resumed["distiller"])
            own.load_state_dict(self._resumed["optimizer"])
            self._resumed = None

    def _renamed(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch whose labels have another name, as ``label_names`` says it, with the usual one."""
        names = self.label_names  # type: ignore[attr-defined]
        if len(names) != 1 or names[0] in FIELDS or names[0] not in inputs or "labels" in inputs:
            return inputs
        return {"labels" if name == names[0] else name: value for name, value in inputs.items()}

    def _total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.args.world_size == 1:
            return value
        total: Tensor = self.accelerator.reduce(value.to(self.args.device), reduction="sum")
        return total


class DistillTrainer(DistillTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with a teacher, see :class:`DistillTrainerMixin`."""


def _teachers(given: Any, student: nn.Module) -> list[Any]:
    if callable(given) and not isinstance(given, nn.Module):
        given = given(student)
        if given is None:
            msg = "teacher must be a function of the student that returns a teacher, got None from it"
            raise TypeError(msg)
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def _check_version() -> None:
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        needed = ".".join(str(x) for x in OLDEST)
        msg = f"DistillTrainer needs transformers {needed} or newer, this is {transformers.__version__}"
        raise ImportError(msg)


def _input_tokens(batch: Any) -> int | Tensor:
    """How many tokens a batch's input has without padding; 0 where it has none."""
    inputs: Inputs = split_batch(batch)
    if inputs.mask is not None:
        return inputs.mask.sum()
    ids = inputs.kwargs.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


def _one_or_all(values: Any) -> Any:
    return values[0] if isinstance(values, (tuple, list)) and len(values) == 1 else values


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) or hasattr(value, "vocab_size") else value
