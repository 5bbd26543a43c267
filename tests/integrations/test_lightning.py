"""DistillMixin inside Lightning's Trainer, against the same steps by hand."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from machine import ONCE_ON_THE_CPU

pytest.importorskip("lightning", reason="Lightning is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

import lightning
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_llama import model_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from trainers import CLIP, LR, causal, close, collate, rows, steps_by_hand

from kdfast.integrations.huggingface import head_of
from kdfast.integrations.lightning import DistillMixin
from kdfast.methods import KD, FitNet

pytestmark = [*ONCE_ON_THE_CPU, pytest.mark.filterwarnings("ignore")]  # of Lightning


class Lit(DistillMixin, lightning.LightningModule):
    def __init__(self, student, teacher, losses=None, **options):
        super().__init__()
        self.student = student
        self.distil(student, teacher, losses, **options)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.student.parameters(), *self.distiller.parameters()], lr=LR)


class Nothing(DistillMixin, lightning.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def trainer_of(folder, **options):
    given = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": CLIP,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
        **options,
    }
    return lightning.Trainer(**given)


def loader(data, size=2):
    return torch.utils.data.DataLoader(data, size, collate_fn=collate)


class Kept(lightning.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if "train/loss" in trainer.callback_metrics and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize("headed", [True, False])
def test_steps_are_those_by_hand(tmp_path, headed):
    data, teacher, student, whole = rows(), model_of(1), model_of(0), model_of(0)
    want = steps_by_hand(whole, teacher, data, 4)
    module = Lit(student, teacher.train(), **({"head": head_of(student)} if headed else {}))
    kept = Kept()
    trainer = trainer_of(tmp_path, callbacks=[kept])
    trainer.fit(module, loader(data))
    close(student, whole)
    assert kept.losses == pytest.approx(want, rel=1e-4)
    assert {"train/kd.soft", "train/entropy", "train/mean_token_accuracy"} <= trainer.callback_metrics.keys()
    assert not any("teacher" in name for name in module.state_dict())
    assert not module.distiller.entered
    assert teacher.training  # as it was
    trainer.validate(module, loader(data, 3), verbose=False)
    with torch.no_grad():
        total, items = causal(student.eval(), teacher.eval(), collate(data))
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx((total / items).item(), rel=1e-4)


def test_parameters_of_the_losses_are_resumed(tmp_path):
    data, teacher = rows(), model_of(1)

    def module(seed):
        torch.manual_seed(seed)
        losses = [KD(temperature=1.0, alpha=0.5), FitNet("model.layers.*", "model.layers.*", weight=0.3)]
        return Lit(model_of(0), teacher, losses, example=collate(data[:2]))

    torch.manual_seed(1)
    whole = module(1)
    trainer_of(tmp_path, max_epochs=2).fit(whole, loader(data))
    first = module(1)
    one = trainer_of(tmp_path, max_epochs=1)
    one.fit(first, loader(data))
    one.save_checkpoint(tmp_path / "c.ckpt")
    second = module(2)
    trainer_of(tmp_path, max_epochs=2).fit(second, loader(data), ckpt_path=tmp_path / "c.ckpt", weights_only=False)
    close(second, whole)
    own = list(first.distiller.parameters())
    for a, b, c in zip(second.distiller.parameters(), whole.distiller.parameters(), own, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert second.distiller.number == 4


def ranks_equal_one(rank, world, folder):
    data, teacher, student, whole = rows(), model_of(1), model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 8)
    module = Lit(student, teacher, head=head_of(student))
    # The ranks of this group: Lightning would start its own.
    trainer = trainer_of(folder, strategy="ddp", devices=world, use_distributed_sampler=False)
    trainer.fit(module, loader(data[rank::world]))
    close(student, whole)


class Sharded(Lit):
    """As Lightning's ModelParallelStrategy wants it."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.student.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.student, mesh=mesh)


def sharded_ranks_equal_one(rank, world, folder, headed):
    data, teacher, student, whole = rows(), model_of(1), model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 8)
    module = Sharded(student, teacher, **({"head": head_of(student)} if headed else {}))
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    trainer = trainer_of(folder, strategy=strategy, devices=world, use_distributed_sampler=False)
    trainer.fit(module, loader(data[rank::world]))
    for (name, a), b in zip(student.named_parameters(), whole.parameters(), strict=True):
        got = a.full_tensor().detach()
        torch.testing.assert_close(got, b.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_equal_one(tmp_path):
    checks = [functools.partial(sharded_ranks_equal_one, headed=headed) for headed in (True, False)]
    ranks.run([functools.partial(check, folder=str(tmp_path)) for check in (ranks_equal_one, *checks)], 2, tmp_path)


def test_what_is_not_served_says_so(tmp_path):
    data, student = rows(), model_of(0)
    with pytest.raises(ValueError, match=r"parameters of fitnet follow .* give distil\(example=\) one"):
        Lit(student, model_of(1), [FitNet("model.layers.*", "model.layers.*")])
    losses = [FitNet("model.layers.*", "model.layers.*")]
    module = Lit(student, model_of(1), losses, example=collate(data[:2]))
    module.configure_optimizers = lambda: torch.optim.SGD(student.parameters(), lr=LR)
    with pytest.raises(ValueError, match="configure_optimizers leaves out parameters of the losses"):
        trainer_of(tmp_path).fit(module, loader(data))
    with pytest.raises(RuntimeError, match="Nothing says nowhere what is distilled"):
        trainer_of(tmp_path).fit(Nothing(), loader(data))
    module = Lit(student, model_of(1))
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="with automatic_optimization=False"):
        trainer_of(tmp_path, gradient_clip_val=None, accumulate_grad_batches=1).fit(module, loader(data))


def test_a_schedule_goes_by_the_trainer_s_steps(tmp_path):
    seen = []

    def step_of(number):
        seen.append(number)
        return 0.5

    module = Lit(model_of(0), model_of(1), [KD(alpha=step_of)])
    fewer = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 4, 1: 2})
    trainer = trainer_of(tmp_path, max_epochs=2, accumulate_grad_batches=1, callbacks=[fewer], log_every_n_steps=0)
    trainer.fit(module, loader(rows(14)))
    assert [*dict.fromkeys(seen)] == list(range(trainer.global_step)) == list(range(6))


class Break(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        raise ZeroDivisionError


def test_a_run_after_one_that_was_broken_off(tmp_path):
    data, student, whole = rows(), model_of(0), model_of(0)
    steps_by_hand(whole, model_of(1), data, 4)
    module = Lit(student, model_of(1))
    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path, callbacks=[Break()]).fit(module, loader(data))
    module.zero_grad()
    trainer_of(tmp_path).fit(module, loader(data))
    close(student, whole)


def test_two_loaders_of_validation(tmp_path):
    data, teacher, student = rows(), model_of(1).eval(), model_of(0).eval()
    trainer, module = trainer_of(tmp_path), Lit(student, teacher)
    trainer.validate(module, [loader(data[:5]), loader(data[5:])], verbose=False)
    for i, part in enumerate((data[:5], data[5:])):
        with torch.no_grad():
            total, items = causal(student, teacher, collate(part))
        name = f"val/{i}/loss"
        assert trainer.callback_metrics[name].item() == pytest.approx((total / items).item(), rel=1e-4)


def test_a_checkpoint_without_a_distiller(tmp_path):
    module = Lit(model_of(0), model_of(1))
    with pytest.warns(UserWarning, match="the checkpoint has no state of a Distiller"):
        module.on_load_checkpoint({"state_dict": {}})


def test_a_batch_without_labelled_tokens(tmp_path):
    """Adds nothing to its step, and its terms, which mean nothing, to no mean."""
    data, teacher, student, whole = rows(), model_of(1), model_of(0), model_of(0)
    for row in data[:2]:
        row["labels"] = [-100] * len(row["labels"])
    steps_by_hand(whole, teacher, data, 4)
    module = Lit(student, teacher)
    trainer = trainer_of(tmp_path)
    trainer.fit(module, loader(data))
    close(student, whole)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert isinstance(module.student, nn.Module)
