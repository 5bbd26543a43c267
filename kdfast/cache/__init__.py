"""The soft-target cache: run the teacher once, train many students from disk.

The format is ``csrc/cache/FORMAT.md``; reading, writing, checksums and codecs are compiled.
"""

import importlib
from typing import Any

from kdfast.cache.dataset import Dataset, collate, collate_flat
from kdfast.cache.error import CacheError
from kdfast.cache.maintenance import Merge, Repair, Verification, merge, repair, verify
from kdfast.cache.reader import Reader, Sample
from kdfast.cache.remote import Push, push
from kdfast.cache.statistics import Histogram, Size, Statistics, sizes, statistics
from kdfast.cache.writer import Writer

__all__ = [
    "CacheError",
    "Dataset",
    "Histogram",
    "Merge",
    "Push",
    "Reader",
    "Repair",
    "Sample",
    "Size",
    "Statistics",
    "Verification",
    "Writer",
    "collate",
    "collate_flat",
    "merge",
    "push",
    "repair",
    "sizes",
    "statistics",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "job":  # which reads documents and runs teachers: imported by who asks for it
        return importlib.import_module("kdfast.cache.job")
    msg = f"module 'kdfast.cache' has no attribute {name!r}"
    raise AttributeError(msg)
