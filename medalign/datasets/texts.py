"""What annotations say as text: numbers count, missing values do not, and anything else is refused by name."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from medalign.data.samples.sample import BadSample

# Whole values, in small letters, that other tools write for a missing one: NaN, NaT and NA of pandas.
_MISSING = ("", "nan", "nat", "<na>")


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, NaN, white space, or the word that another tool writes for them."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any, name: str) -> str:
    """A text as it is, a number as text, "" for what is missing. Raises BadSample, with the field's name, for the rest.

    The rest are lists, objects, true and false, and infinity.
    """
    if is_missing(value):
        return ""
    infinite = isinstance(value, float) and math.isinf(value)
    if infinite or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadSample(f"{name} is {reprlib.repr(value)}, not text")
    return str(value)


def field(row: Mapping[str, Any], name: str) -> str:
    """The text of a field, white space folded, as in `as_text`. Raises BadSample."""
    return " ".join(as_text(row.get(name), name).split())


def text(value: Any) -> str:
    """As `field` for what may be left out: anything that is not text is ""."""
    try:
        return " ".join(as_text(value, "").split())
    except BadSample:
        return ""


def yes_no_type(answer: str) -> str:
    """ "closed" for a yes or no, else "open"."""
    return "closed" if answer.strip().lower().rstrip(".") in ("yes", "no") else "open"
