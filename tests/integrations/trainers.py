"""What the tests of trainers share: data, arguments, and the steps that a trainer is to make, by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from tiny_llama import V

import kdfast
from kdfast import cache
from kdfast.integrations.trainer import DistillTrainer

LR, CLIP = 0.05, 1.0


def rows(n=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    ids = [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": one, "labels": [-100, *one[1:]], "attention_mask": [1] * len(one)} for one in ids]


def collate(features):
    longest = max(len(f["input_ids"]) for f in features)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    fill = {k: v for k, v in fill.items() if k in features[0]}
    return {k: torch.tensor([f[k] + [v] * (longest - len(f[k])) for f in features]) for k, v in fill.items()}


def filled(folder, teacher, data):
    """A cache of all that the teacher says of samples (key, ids)."""
    with torch.no_grad(), cache.Writer(folder, vocab_size=V) as writer:
        for key, ids in data:
            x = torch.tensor(ids)
            writer.write(key, kdfast.soft_targets(teacher(input_ids=x[None]).logits[0], k=V), x)
    return cache.Reader(folder)


def options(folder, **given):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LR,
        "max_grad_norm": CLIP,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "data_seed": 1,
        "seed": 1,
        **given,
    }


def arguments(folder, **given):
    return transformers.TrainingArguments(**options(folder, **given))


class InOrder:
    """A trainer's data in the order of the list."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ordered(InOrder, DistillTrainer):
    pass


def sum_of(z, t, y, weights=1.0):
    """Half KL at T = 1, half cross-entropy, summed over the labels that are not -100."""
    p, q = F.log_softmax(z, -1), F.log_softmax(t, -1)
    hard = F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none", ignore_index=-100).view(y.shape)
    return ((0.5 * (q.exp() * (q - p)).sum(-1) + 0.5 * hard) * (y != -100) * weights).sum()


def causal(student, teacher, batch, weights=1.0):
    """The sum over the predicted tokens of a batch, and their number."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    y = batch["labels"][:, 1:]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1]
    return sum_of(student(**inputs).logits[:, :-1], t, y, weights), (y != -100).sum()


def steps_by_hand(student, teacher, data, per_step, summed=causal, collated=collate):
    """Each step over so many rows at once, however a trainer cuts them into micro-batches and ranks."""
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    losses = []
    for first in range(0, len(data), per_step):
        optimizer.zero_grad()
        total, items = summed(student, teacher, collated(data[first : first + per_step]))
        loss = total / items
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(student, other, rtol=1e-4, atol=1e-6):
    for (name, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
