"""The job that fills a cache: documents, samples, a teacher, and a writer.

samples = samples_of(Source([path]).documents(length, rank, world), tokenizer.encode, length, rank, world)
with Writer(out, vocab_size=teacher.vocab_size, ...) as writer:
fill(writer, teacher, samples, Capture(k=64), batch_tokens=16384)
"""

from kdfast.cache.error import JobError
from kdfast.cache.job.fill import Capture, Filled, fill
from kdfast.cache.job.samples import Document, Sample, samples_of
from kdfast.cache.job.sources import Source
from kdfast.cache.job.spec import Job
from kdfast.cache.job.teacher import Teacher, from_factory, from_model

__all__ = [
    "Capture",
    "Document",
    "Filled",
    "Job",
    "JobError",
    "Sample",
    "Source",
    "Teacher",
    "fill",
    "from_factory",
    "from_model",
    "samples_of",
]
