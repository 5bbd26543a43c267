"""A job in plain values, which every process that takes part can be given."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
import torch

from kdfast.cache.error import CacheError, JobError
from kdfast.cache.grid import Grid
from kdfast.cache.job.fill import Capture, Filled, fill
from kdfast.cache.job.samples import Document, Sample, samples_of
from kdfast.cache.job.sources import Source
from kdfast.cache.job.teacher import Teacher, from_factory, from_model
from kdfast.cache.writer import Tier, Writer

if TYPE_CHECKING:
    from kdfast.cache.job.tokens import Tokenizer

_TIERS = get_args(Tier)
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Job:
    """The options of ``kdfast cache build``, by their names there; files are opened and models loaded when asked for.

    Raises:
        JobError: options that cannot be meant; the methods, of what they open.
    """

    out: Path
    source: Source
    capture: Capture
    model: Path | None = None
    factory: str | None = None
    revision: str | None = None
    teacher_license: str | None = None
    data_license: str | None = None
    tokenizer: Path | None = None
    special_tokens: bool = True
    chat_template: Path | None = None
    completions_only: bool = False
    length: int = 2048
    batch_tokens: int = 16384
    tier: str = "fixed"
    grid: Grid = "auto"
    dtype: str = "auto"
    device: str | None = None
    whole_logits: bool = False
    commit_every: float = 60.0
    directory: str = field(default_factory=os.getcwd)  #: where the module of a factory is looked for first

    def __post_init__(self) -> None:
        if (self.model is None) == (self.factory is None):
            msg = "a teacher is needed: pass --model DIR or --factory module:function, one of them"
            raise JobError(msg)
        if self.batch_tokens < self.length:
            msg = f"--batch-tokens {self.batch_tokens} does not hold one sample of --length {self.length}"
            raise JobError(msg)
        if self.tier not in _TIERS:
            msg = f"--tier must be one of {', '.join(_TIERS)}, got {self.tier!r}"
            raise JobError(msg)
        if self.dtype not in _DTYPES:
            msg = f"--dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}"
            raise JobError(msg)
        if self.model is not None and self.revision is not None:
            msg = "--revision is for a factory: that of a model is made from its files"
            raise JobError(msg)
        if self.model is None and (self.dtype != "auto" or self.whole_logits):
            msg = "--dtype and --whole-logits are for --model: a factory chooses itself"
            raise JobError(msg)

    def encoder(self) -> Tokenizer | None:
        """The tokenizer that was named, or the model's for text: the first document tells what the data are."""
        from kdfast.cache.job import tokens

        first: list[Document] = list(itertools.islice(self.source.documents(self.length), 1))
        if not first:
            msg = "the data hold no record"
            raise JobError(msg)
        content = first[0].content
        if self.chat_template is not None and not self.chat_template.is_file():
            msg = f"--chat-template must be a file, got {self.chat_template}"
            raise JobError(msg)
        if self.tokenizer is not None and not self.tokenizer.is_dir():
            return tokens.from_file(self.tokenizer, special_tokens=self.special_tokens)
        if isinstance(content, np.ndarray) and self.tokenizer is None:
            return None
        directory = self.model if self.tokenizer is None else self.tokenizer
        if directory is None:
            msg = "the data are text, and the factory brings no tokenizer: pass --tokenizer tokenizer.json"
            raise JobError(msg)
        return tokens.from_model(
            directory,
            special_tokens=self.special_tokens,
            conversations=not isinstance(content, (str, np.ndarray)),
            template=self.chat_template,
            completions_only=self.completions_only,
        )

    def samples(self, encoder: Tokenizer | None, rank: int, world: int) -> Iterator[Sample]:
        """Those of process ``rank`` of ``world``."""
        encode, chat = (None, None) if encoder is None else (encoder.encode, encoder.chat)
        documents = self.source.documents(self.length, rank, world)
        if self.completions_only:
            documents = map(_conversation, documents)
        return samples_of(documents, encode, self.length, rank, world, chat=chat)

    def teacher(self) -> Teacher:
        """The teacher, on the device of this process."""
        where = _device(self.device)
        if self.model is None:
            assert self.factory is not None
            return from_factory(self.factory, where, self.revision, self.directory)
        return from_model(
            self.model, dtype=_DTYPES[self.dtype], device=where, length=self.length, whole_logits=self.whole_logits
        )

    def writer(self, teacher: Teacher, encoder: Tokenizer | None) -> Writer:
        """This process's own writer.

        Raises:
            CacheError: a cache of another job.
        """
        built = self.capture.metadata() | {"length": self.length}
        if encoder is not None:
            built["special_tokens"] = self.special_tokens
        if self.completions_only:
            built["completions_only"] = True
        if encoder is not None and encoder.template is not None:
            built["chat_template"] = encoder.template
        try:
            return Writer(
                self.out,
                vocab_size=teacher.vocab_size,
                tier=cast(Tier, self.tier),
                teacher=teacher.name,
                revision=teacher.revision,
                dtype=teacher.dtype,
                teacher_license=self.teacher_license,
                data_license=self.data_license,
                tokenizer=None if encoder is None else encoder.fingerprint,
                metadata={"build": built},
                # of a new cache those of its first sample: a job that fails before it leaves no cache behind
                temperatures=self.capture.captured if (self.out / "cache.header").exists() else None,
                grid=self.grid,
            )
        except CacheError:
            raise
        except ValueError as error:
            raise JobError(str(error)) from error

    def fill(
        self,
        writer: Writer,
        teacher: Teacher,
        samples: Iterable[Sample],
        *,
        report: Callable[[Filled], None],
        stop: Callable[[], bool],
    ) -> Filled:
        """:func:`fill` with the job's options; closes the writer."""
        with writer:
            filled = fill(
                writer,
                teacher,
                samples,
                self.capture,
                batch_tokens=self.batch_tokens,
                commit_seconds=self.commit_every,
                report=report,
                stop=stop,
            )
        filled.committed_bytes = writer.bytes_written()  # an index more than at the last commit
        return filled


def _conversation(document: Document) -> Document:
    if isinstance(document.content, str) or (isinstance(document.content, np.ndarray) and len(document.content)):
        msg = f"document {document.key!r} is no conversation, and --completions-only is for them"
        raise JobError(msg)
    return document


def _device(name: str | None) -> torch.device:
    """The device that was named, or the best; under torchrun each process takes a GPU of its own."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        msg = f"--device {name}: {error}"
        raise JobError(msg) from error
    if device.type == "cuda":
        number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if number >= torch.cuda.device_count():
            msg = f"--device {device}: there are {torch.cuda.device_count()} GPUs, and process {number} needs one"
            raise JobError(msg)
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device
