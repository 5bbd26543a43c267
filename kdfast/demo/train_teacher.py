"""Trains the teacher that ships with the package: `python -m kdfast.demo.train_teacher`.

Writes `teacher.safetensors` (bf16), `tokenizer.json` and `teacher.json`, the settings and figures of the run, into
`kdfast/demo/teacher/`. Only the training part of the corpus is read for learning, by the tokenizer as well.
Needs torch >= 2.9 for `torch.optim.Muon`, which reaches a given loss in fewer steps than AdamW on a model this small.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kdfast.demo.corpus import load_corpus
from kdfast.demo.data import batch_order, learning_rate_factor, sequences
from kdfast.demo.model import GPT, GPTConfig
from kdfast.demo.tokenizer import encode, train_tokenizer

TEACHER_FOLDER = Path(__file__).parent / "teacher"


@dataclass(frozen=True)
class TeacherSettings:
    """Everything the run depends on besides the machine and the Python version."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 256  # tokens
    batch: int = 8  # sequences
    steps: int = 2700
    warmup: int = 100  # steps
    learning_rate_muon: float = 0.005  # the blocks' matrices, scaled to AdamW's size of update
    learning_rate_adamw: float = 0.005  # embedding and norms
    weight_decay: float = 0.1
    seed: int = 0
    threads: int = 2


def train(settings: TeacherSettings, out: Path) -> None:
    """Trains tokenizer and teacher and writes the three files into the folder."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.train)
    stream = encode(tokenizer, corpus.train)
    held_out = sequences(encode(tokenizer, corpus.held_out), settings.context, 400)
    config = GPTConfig(tokenizer.get_vocab_size(), settings.width, settings.layers, settings.heads, settings.context)
    model = GPT(config)
    print(f"{model.parameter_count()} parameters, {stream.numel()} training tokens", flush=True)
    started = time.perf_counter()
    _fit(model, stream, settings)
    minutes = (time.perf_counter() - started) / 60
    nats = held_out_nats(model, held_out)
    weights = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # what ships is rounded to bf16: the figures are those of the rounded weights
    rounded_nats = held_out_nats(model, held_out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "teacher.safetensors")
    tokenizer.save(str(out / "tokenizer.json"))
    record = {
        "config": asdict(config),
        "settings": asdict(settings),
        "figures": {
            "parameters": model.parameter_count(),
            "train_files": len(corpus.train),
            "train_tokens": stream.numel(),
            "held_out_tokens": held_out[:, 1:].numel(),
            "held_out_nats_fp32": round(nats, 4),
            "held_out_nats": round(rounded_nats, 4),
            "minutes": round(minutes, 1),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (out / "teacher.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["figures"]))


def held_out_nats(model: GPT, ids: Tensor, batch: int = 16) -> float:
    """Returns the mean cross-entropy in nats per token over (N, S + 1) sequences."""
    total = 0.0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for part in torch.split(ids, batch):
            logits = model(part[:, :-1]).float()
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / ids[:, 1:].numel()


def _fit(model: GPT, stream: Tensor, settings: TeacherSettings) -> None:
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (name.startswith("blocks") and p.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=settings.learning_rate_muon,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=settings.learning_rate_adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_factor(step, settings.steps, settings.warmup))
        for o in optimizers
    ]
    context = settings.context
    windows = stream.unfold(0, context + 1, 1)
    order = batch_order(stream.numel() // context - 2, settings.batch, settings.steps, settings.seed)
    shift = torch.randint(0, context, order.shape)  # so that a later pass cuts the text at other places
    started = time.perf_counter()
    for step, starts in enumerate(order * context + shift):
        ids = windows[starts]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == settings.steps:
            seconds = time.perf_counter() - started
            print(f"step {step}: {loss.item():.3f} nats, {seconds:.0f} s", flush=True)


def main() -> None:
    """Reads the options and trains."""
    parser = argparse.ArgumentParser(description="Train the teacher of `kdfast demo`.")
    parser.add_argument("--steps", type=int, default=TeacherSettings.steps)
    parser.add_argument("--seed", type=int, default=TeacherSettings.seed)
    parser.add_argument("--threads", type=int, default=TeacherSettings.threads)
    parser.add_argument("--out", type=Path, default=TEACHER_FOLDER, help="folder for the three files")
    options = parser.parse_args()
    train(TeacherSettings(steps=options.steps, seed=options.seed, threads=options.threads), options.out)


if __name__ == "__main__":
    main()
