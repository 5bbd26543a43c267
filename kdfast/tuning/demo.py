"""The demonstration's student as an objective: cross-entropy on text that is neither trained on nor reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kdfast.demo.corpus import HELD_OUT_PERCENT, Corpus, SourceFile, load_corpus, percentile
from kdfast.demo.data import sequences
from kdfast.demo.display import Display
from kdfast.demo.settings import DemoSettings, Method
from kdfast.demo.student import Student
from kdfast.demo.teacher import label, load_teacher
from kdfast.demo.tokenizer import encode
from kdfast.loss import distill_loss
from kdfast.spec.divergence import Divergence
from kdfast.tuning.search import Report
from kdfast.tuning.space import TuneError, format_settings

METRIC = "nats per token of validation text"
SPACE = ("temperature=1:8:log", "alpha=0:1")
VALIDATION_PERCENT = 10  # of the files that the demonstration trains on

#: A shorter run than the demonstration's own: its order of settings is what counts. No report before step 100, where
#: the curves of good and bad settings still cross.
LENGTH = DemoSettings(steps=300, train_sequences=400, probe_every=100, probe_sequences=64)

#: What can be set, and the demonstration's own values: the baseline.
DEFAULTS = {
    "temperature": LENGTH.temperature,
    "alpha": LENGTH.alpha,
    "divergence": "forward_kl",
    "learning_rate": LENGTH.learning_rate,
}


class DemoObjective:
    """Trains one student of the demonstration by all of its teacher's logits.

    Args:
        length: steps, sequences and shape; ``probe_sequences`` is the number of those of the validation text.
        display: shows the teacher at work, once.
    """

    def __init__(self, length: DemoSettings, display: Display) -> None:
        self.length, self.display = length, display

    def prepare(self) -> None:
        """Reads the text and has the teacher label it.

        Raises:
            DemoError: too little memory for the logits.
            FileNotFoundError: this Python has no standard library in source form.
        """
        length, display = self.length, self.display
        teacher, tokenizer, _ = load_teacher()
        corpus = load_corpus()
        train, validation = split(corpus)
        self.vocab_size = tokenizer.get_vocab_size()
        self.ids = sequences(encode(tokenizer, train), length.context, length.train_sequences)
        self.validation = sequences(encode(tokenizer, validation), length.context, length.probe_sequences)
        display.task("teacher labels the text", len(self.ids))
        self.logits = label(teacher, self.ids, lambda done, _total: display.advance(done))

    def __call__(self, settings: dict[str, Any], seed: int, report: Report) -> float:
        """Returns the validation text's cross-entropy, nats per token."""
        method, length = trained_by(settings, self.length)
        student = Student(length, method, seed, self.vocab_size, len(self.ids))
        while not student.done:
            student.advance(self.ids, self.logits.__getitem__)
            if student.step % length.probe_every == 0 and not student.done:
                report(student.step, self.nats(student))
        return self.nats(student)

    def nats(self, student: Student) -> float:
        """Cross-entropy of the validation text."""
        total = 0.0
        with torch.inference_mode():
            for part in torch.split(self.validation, self.length.batch):
                loss: Any = distill_loss(student.model(part[:, :-1]), None, part[:, 1:], reduction="sum")
                total += float(loss)
        return total / self.validation[:, 1:].numel()


def trained_by(settings: dict[str, Any], length: DemoSettings) -> tuple[Method, DemoSettings]:
    """A student's loss, and the settings of its run.

    Raises:
        TuneError: a setting that the demonstration has not, or a value that it cannot have.
    """
    unknown = sorted(set(settings) - set(DEFAULTS))
    if unknown:
        msg = f"the demonstration has no setting {', '.join(unknown)}; it has {', '.join(DEFAULTS)}"
        raise TuneError(msg)
    values = {**DEFAULTS, **settings}
    for name in ("temperature", "alpha", "learning_rate"):
        if not isinstance(values[name], int | float):
            msg = f"{name} must be a number, got {values[name]!r}"
            raise TuneError(msg)
    if not (values["temperature"] > 0 and values["learning_rate"] > 0 and 0 <= values["alpha"] <= 1):
        msg = f"temperature and learning_rate must be above 0 and alpha 0 to 1, got {format_settings(values)}"
        raise TuneError(msg)
    try:
        Divergence(values["divergence"])
    except (TypeError, ValueError) as error:
        raise TuneError(str(error)) from error
    rate = values.pop("learning_rate")
    return Method(**values, online=True), replace(length, learning_rate=rate)


def split(corpus: Corpus) -> tuple[list[SourceFile], list[SourceFile]]:
    """The training files to train on and those to validate by: whole files, by their names alone."""
    validation = [file for file in corpus.train if percentile(file.name) < HELD_OUT_PERCENT + VALIDATION_PERCENT]
    return [file for file in corpus.train if file not in validation], validation
