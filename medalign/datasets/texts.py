"""Convert annotation values to text: numbers are accepted, missing values are empty, all others are rejected."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from medalign.data.samples.sample import BadSample

# Complete values, in lower case, that other tools write for a missing value: NaN, NaT and NA of pandas.
_MISSING = ("", "nan", "nat", "<na>")


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: null, NaN, white space, or a word that other tools write for it."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any, name: str) -> str:
    """Convert a value to text: a number becomes text, a missing value becomes "".

    Raises:
        BadSample: the value is a list, an object, a boolean, or infinite. The message contains `name`.
    """
    if is_missing(value):
        return ""
    infinite = isinstance(value, float) and math.isinf(value)
    if infinite or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadSample(f"{name} is {reprlib.repr(value)}, which is not text")
    return str(value)


def field(row: Mapping[str, Any], name: str) -> str:
    """Return the text of a field as in `as_text`, with white space folded. Raises BadSample."""
    return " ".join(as_text(row.get(name), name).split())


def text(value: Any) -> str:
    """Convert an optional value to text, with white space folded; values that are not text become ""."""
    try:
        return " ".join(as_text(value, "").split())
    except BadSample:
        return ""


def yes_no_type(answer: str) -> str:
    """Return "closed" for the answers yes and no, and "open" otherwise."""
    return "closed" if answer.strip().lower().rstrip(".") in ("yes", "no") else "open"
