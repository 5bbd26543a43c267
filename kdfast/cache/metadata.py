"""What the writer of a cache said of teacher and tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from kdfast.cache.error import CacheError

#: What a writer takes by name; the rest is its ``metadata``.
NAMED = ("teacher", "tokenizer", "revision", "dtype", "teacher_license", "data_license")


def metadata_text(values: Mapping[str, Any]) -> str:
    """Metadata as they are stored: equal ones are equal text.

    Raises:
        TypeError, ValueError: values that JSON does not have.
    """
    try:
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        msg = f"metadata must be JSON: {error}"
        raise type(error)(msg) from error


def metadata(text: str, path: str) -> dict[str, Any]:
    """The metadata in the header of the cache at ``path``.

    Raises:
        CacheError: they are not a JSON object.
    """
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        what = f"the metadata are not JSON: {error}"
        raise CacheError(what, "corrupt", os.path.join(path, "cache.header")) from error
    if not isinstance(value, dict):
        what = "the metadata are not a JSON object"
        raise CacheError(what, "corrupt", os.path.join(path, "cache.header"))
    return value


def _no_number(name: str) -> NoReturn:
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)
