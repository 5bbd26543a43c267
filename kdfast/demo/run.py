"""The whole demonstration: label once, train students on the same batches, measure, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from kdfast.cache import CacheError
from kdfast.demo import checkpoint
from kdfast.demo.checkpoint import Interrupted, Progress
from kdfast.demo.corpus import Corpus, load_corpus
from kdfast.demo.data import places, sequences
from kdfast.demo.display import Display, terms_text
from kdfast.demo.evaluate import compare_loss_time, evaluate, inference_speed
from kdfast.demo.model import GPT
from kdfast.demo.page import write_report
from kdfast.demo.results import comparison, gains, summary
from kdfast.demo.settings import DemoError, DemoSettings, Method
from kdfast.demo.student import Student
from kdfast.demo.targets import Stored, Targets, Written
from kdfast.demo.teacher import check_memory, label, load_teacher
from kdfast.demo.tokenizer import encode
from kdfast.reporting.environment import environment
from kdfast.reporting.outputs import check_folder
from kdfast.reporting.words import counted

RESULTS_NAME = "results.json"
REPORT_NAME = "report.html"


def run_demo(
    settings: DemoSettings,
    out: Path,
    display: Display,
    *,
    resume: bool = False,
    restart: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs the demonstration and writes `results.json`, `report.html`, the students and the cache into a folder.

    A cache that is there, of the same teacher and text, is used; what it lacks is written.

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
        DemoError: a folder that cannot be written; a checkpoint that is missing, in the way or of another run; a cache
            that is damaged or of another teacher or text; too little memory.
        FileNotFoundError: this Python has no standard library in source form.
        Interrupted: `interrupted` said yes; the checkpoint is written.
    """
    try:
        check_folder(out, "--out", (RESULTS_NAME, REPORT_NAME))
    except OSError as error:
        raise DemoError(str(error)) from error
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
    try:
        return _Run(settings, out, display, progress, interrupted).finish()
    except CacheError as error:
        remedy = "" if error.code == "system" else ": delete that folder to have it written anew, or name another --out"
        msg = f"{error}{remedy}"
        raise DemoError(msg) from error


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
            students, steps = counted(len(self.progress.finished), "student"), counted(step, "step")
            display.note(f"going on after {students} and {steps} of the next one")
        display.note("reading the standard library's source")
        teacher, tokenizer, record = load_teacher()
        corpus = load_corpus()
        train, numbers, held_out = self.texts(corpus, tokenizer)
        left = [
            (seed, method) for seed in settings.seeds for method in settings.methods if not self.trained(seed, method)
        ]
        if any(method.online for _, method in left):
            check_memory(teacher, train)
        stored = None if settings.online else self.store(teacher, tokenizer, train, numbers)
        probe = held_out[torch.arange(settings.probe_sequences) * len(held_out) // settings.probe_sequences]
        probe_logits = label(teacher, probe, lambda _done, _total: self.stop_if_asked())
        display.note("measuring the teacher")
        score, top1 = evaluate(teacher, held_out, None, settings.calibration_sequences, self.stop_if_asked)
        cached = None if stored is None else stored.targets()
        online: Targets | None = None
        for seed, method in left:
            if method.online and online is None:
                display.task("teacher labels the text, all logits", len(train))
                online = label(teacher, train, self.labelled).__getitem__
            self.student = Student(settings, method, seed, tokenizer.get_vocab_size(), len(train))
            if self.progress.current is not None:
                self.student.load_state_dict(self.progress.current)
            title = method.title if len(settings.seeds) == 1 else f"{method.title}, seed {seed}"
            display.task(f"{len(self.progress.finished) + 1}. {title}", settings.steps)
            targets = None if method.divergence is None else online if method.online else cached
            self.train(self.student, train, targets, probe, probe_logits)
            self.measure(self.student, held_out, top1)
        last = GPT(settings.student(tokenizer.get_vocab_size()))
        last.load_state_dict(load_file(out / self.progress.finished[-1]["weights"]))
        rows = slice(0, settings.batch)
        with torch.no_grad():
            logits = last(train[rows, :-1])
        some = label(teacher, train[rows], lambda _done, _total: None)
        times = compare_loss_time(logits, some, train[rows, 1:], settings.temperature, settings.alpha)
        speed = inference_speed(teacher, train[rows, :-1])
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
                "logits_bytes": train[:, 1:].numel() * teacher.config.vocab_size * some.element_size(),
            },
            "cache": None if stored is None else self.cache(stored, speed["tokens_per_second"]),
            "teacher": {
                "parameters": teacher.parameter_count(),
                "evaluation": asdict(score),
                "speed": speed,
                "training": record,
            },
            "student": {
                "parameters": last.parameter_count(),
                "speed": inference_speed(last, train[rows, :-1]),
            },
            "students": self.progress.finished,
            "summary": summary(settings, self.progress.finished),
            "gains": gains(settings, self.progress.finished),
            "comparison": comparison(settings, self.progress.finished),
            "loss_comparison": times,
            "seconds": time.perf_counter() - self.started,
        }
        text = json.dumps(results, indent=1, allow_nan=False)
        (out / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
        written: dict[str, Any] = json.loads(text)
        write_report(written, out / REPORT_NAME)
        checkpoint.remove(out)
        return written

    def texts(self, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the distillation set, (N, S + 1), the numbers of its sequences, and the held-out set."""
        settings = self.settings
        stream = encode(tokenizer, corpus.train)
        train = sequences(stream, settings.context, settings.train_sequences)
        numbers = places(stream.numel(), settings.context, settings.train_sequences)
        held_out = sequences(encode(tokenizer, corpus.held_out), settings.context, settings.held_out_sequences)
        self.stop_if_asked()
        return train, numbers, held_out

    def store(self, teacher: GPT, tokenizer: Tokenizer, ids: Tensor, numbers: Tensor) -> Stored:
        """Returns the cache of the run, whole."""
        settings = self.settings
        folder = self.out / f"cache-T{settings.temperature}"
        stored = Stored(folder, ids, numbers, settings.k, settings.temperature)
        written = Written(**self.progress.written)
        whole = stored.write(teacher, tokenizer, written, self.display, self.interrupted)
        if written.samples:
            self.progress.written = asdict(written)
        if not whole:
            self.save()
            raise Interrupted
        if not written.samples:
            self.display.note(f"the teacher's targets are in {folder} already")
        return stored

    def cache(self, stored: Stored, teacher_speed: float) -> dict[str, Any]:
        """Returns what the report says of the cache; the speed is in tokens/s."""
        settings = self.settings
        return {
            **stored.description(),
            "written": self.progress.written or None,  # None: by an earlier run
            "in_loop_seconds": settings.steps * settings.batch * settings.context / teacher_speed,
        }

    def trained(self, seed: int, method: Method) -> bool:
        """Says whether that student is among the finished ones."""
        return any(row["seed"] == seed and row["method"] == method.name for row in self.progress.finished)

    def train(
        self, student: Student, ids: Tensor, targets: Targets | None, probe: Tensor, probe_logits: Tensor
    ) -> None:
        settings = self.settings
        begun, first = time.perf_counter(), student.step
        while not student.done:
            if student.step % settings.probe_every == 0:
                student.probe(probe, probe_logits)
            student.advance(ids, targets)
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
                "online": student.method.online,
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
