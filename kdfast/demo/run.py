"""The whole demonstration: label once, train three students on the same batches, measure, report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import kdfast
from kdfast.demo import checkpoint
from kdfast.demo.checkpoint import Interrupted, Progress
from kdfast.demo.corpus import Corpus, load_corpus
from kdfast.demo.data import sequences
from kdfast.demo.display import Display, terms_text
from kdfast.demo.evaluate import compare_loss_time, evaluate, inference_speed
from kdfast.demo.model import GPT
from kdfast.demo.settings import DemoError, DemoSettings
from kdfast.demo.student import TIMED, Student
from kdfast.demo.teacher import label, load_teacher
from kdfast.demo.tokenizer import encode
from kdfast.reporting.demo import write_report

RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"
SUMMARISED = ("nats", "perplexity", "accuracy", "agreement", "ece", "fitted_temperature", "ece_fitted")


def run_demo(
    settings: DemoSettings,
    out: Path,
    display: Display,
    *,
    resume: bool = False,
    restart: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs the demonstration and writes `results.json`, `report.html` and the students into a folder.

    Args:
        settings: what to run.
        out: the folder, made where it does not exist.
        display: receives the progress.
        resume: go on from the folder's checkpoint.
        restart: drop the folder's checkpoint.
        interrupted: asked after every step and batch; once it says yes, the run leaves a checkpoint and stops.

    Returns:
        The results, as written to `results.json`.

    Raises:
        DemoError: a checkpoint that is missing, in the way or of another run; too little memory.
        FileNotFoundError: this Python has no standard library in source form.
        Interrupted: `interrupted` said yes; the checkpoint is written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        progress = checkpoint.load(out, settings)
    else:
        if restart:
            checkpoint.remove(out)
        if (out / checkpoint.FILE_NAME).exists():
            msg = f"{out} holds an unfinished run: go on with --resume, or start over with --restart"
            raise DemoError(msg)
        progress = Progress()
    return _Run(settings, out, display, progress, interrupted).finish()


class _Run:
    """One run: its inputs, and how far it has come."""

    def __init__(
        self, settings: DemoSettings, out: Path, display: Display, progress: Progress, interrupted: Callable[[], bool]
    ) -> None:
        self.settings = settings
        self.out = out
        self.display = display
        self.progress = progress
        self.interrupted = interrupted
        self.student: Student | None = None
        self.started = time.perf_counter() - progress.seconds

    def finish(self) -> dict[str, Any]:
        settings, display, out = self.settings, self.display, self.out
        if self.progress.finished or self.progress.current is not None:
            step = 0 if self.progress.current is None else self.progress.current["step"]
            display.note(f"going on after {len(self.progress.finished)} students and {step} steps of the next one")
        display.note("reading the standard library's source")
        teacher, tokenizer, record = load_teacher()
        corpus = load_corpus()
        train, held_out = self.texts(corpus, tokenizer)
        display.task("teacher labels the text", len(train))
        labelled = label(teacher, train, self.labelled)
        probe = held_out[torch.arange(settings.probe_sequences) * len(held_out) // settings.probe_sequences]
        probe_logits = label(teacher, probe, lambda _done, _total: self.stop_if_asked())
        display.note("measuring the teacher")
        score, top1 = evaluate(teacher, held_out, None, settings.calibration_sequences, self.stop_if_asked)
        for seed in settings.seeds:
            for method in settings.methods:
                index = len(self.progress.finished)
                if any(row["seed"] == seed and row["method"] == method.name for row in self.progress.finished):
                    continue
                self.student = Student(settings, method, seed, tokenizer.get_vocab_size(), len(train))
                if self.progress.current is not None:
                    self.student.load_state_dict(self.progress.current)
                title = method.title if len(settings.seeds) == 1 else f"{method.title}, seed {seed}"
                display.task(f"{index + 1}. {title}", settings.steps)
                self.train(self.student, train, labelled, probe, probe_logits)
                self.measure(self.student, held_out, top1)
        last = GPT(settings.student(tokenizer.get_vocab_size()))
        last.load_state_dict(load_file(out / self.progress.finished[-1]["weights"]))
        rows = slice(0, settings.batch)
        with torch.no_grad():
            logits = last(train[rows, :-1])
        comparison = compare_loss_time(logits, labelled[rows], train[rows, 1:], settings.temperature, settings.alpha)
        results = {
            "kind": "kdfast demo",
            "quick": settings.quick,
            "settings": asdict(settings),
            "environment": environment(),
            "data": {
                "train_files": len(corpus.train),
                "held_out_files": len(corpus.held_out),
                "train_tokens": train[:, 1:].numel(),
                "held_out_tokens": held_out[:, 1:].numel(),
                "labels_bytes": labelled.numel() * labelled.element_size(),
            },
            "teacher": {
                "parameters": teacher.parameter_count(),
                "evaluation": asdict(score),
                "speed": inference_speed(teacher, train[rows, :-1]),
                "training": record,
            },
            "student": {
                "parameters": last.parameter_count(),
                "speed": inference_speed(last, train[rows, :-1]),
            },
            "students": self.progress.finished,
            "summary": summary(settings, self.progress.finished),
            "loss_comparison": comparison,
            "seconds": time.perf_counter() - self.started,
        }
        text = json.dumps(results, indent=1, allow_nan=False)
        (out / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        written: dict[str, Any] = json.loads(text)
        write_report(written, out / REPORT_NAME)
        checkpoint.remove(out)
        return written

    def texts(self, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Returns the distillation set and the held-out set, (N, S + 1) each."""
        settings = self.settings
        train = sequences(encode(tokenizer, corpus.train), settings.context, settings.train_sequences)
        held_out = sequences(encode(tokenizer, corpus.held_out), settings.context, settings.held_out_sequences)
        self.stop_if_asked()
        return train, held_out

    def train(self, student: Student, ids: Tensor, labelled: Tensor, probe: Tensor, probe_logits: Tensor) -> None:
        settings = self.settings
        begun, first = time.perf_counter(), student.step
        while not student.done:
            if student.step % settings.probe_every == 0:
                student.probe(probe, probe_logits)
            student.advance(ids, labelled)
            rate = (student.step - first) * settings.batch * settings.context / (time.perf_counter() - begun)
            self.display.advance(student.step, f"{terms_text(student.history)} nats  {rate:,.0f} tokens/s")
            self.stop_if_asked()
            if student.step % settings.checkpoint_every == 0:
                self.save()
        student.probe(probe, probe_logits)

    def measure(self, student: Student, held_out: Tensor, teacher_top1: Tensor) -> None:
        """Adds the trained student to the finished ones."""
        score, _ = evaluate(
            student.model, held_out, teacher_top1, self.settings.calibration_sequences, self.stop_if_asked
        )
        name = f"student-{student.method.name}-seed{student.seed}.safetensors"
        save_file(student.model.state_dict(), self.out / name)
        self.progress.finished.append(
            {
                "method": student.method.name,
                "title": student.method.title,
                "divergence": student.method.divergence,
                "temperature": student.method.temperature,
                "alpha": student.method.alpha,
                "seed": student.seed,
                "weights": name,
                "evaluation": asdict(score),
                "history": student.history,
                "probes": student.probes,
                "seconds": student.seconds,
            }
        )
        self.student, self.progress.current = None, None
        self.save()

    def labelled(self, done: int, total: int) -> None:
        self.display.advance(done)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self.interrupted():
            self.save()
            raise Interrupted

    def save(self) -> None:
        if self.student is not None:
            self.progress.current = self.student.state_dict()
        self.progress.seconds = time.perf_counter() - self.started
        checkpoint.save(self.out, self.settings, self.progress)


def summary(settings: DemoSettings, students: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over the seeds for each way of training."""
    rows = []
    for method in settings.methods:
        runs = [run for run in students if run["method"] == method.name]
        row: dict[str, Any] = {"method": method.name, "title": method.title}
        for key in SUMMARISED:
            row[key] = _mean_and_std([run["evaluation"][key] for run in runs])
        row["loss_share"] = _mean_and_std([run["seconds"]["loss"] / sum(run["seconds"].values()) for run in runs])
        # The lowest held-out cross-entropy on the way: what stopping early would have given.
        row["best_probe"] = _mean_and_std([min(run["probes"]["hard"]) for run in runs])
        row["last_probe"] = _mean_and_std([run["probes"]["hard"][-1] for run in runs])
        for name in TIMED:
            row[f"ms_{name}"] = _mean_and_std([1e3 * run["seconds"][name] / settings.steps for run in runs])
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """Returns what ran: versions, processor, threads."""
    return {
        "kdfast": kdfast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _mean_and_std(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
