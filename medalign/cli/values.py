"""Number types for the command line, with errors that give the expected range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def argument_type(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """Wrap `parse` for argparse, which otherwise does not show the message of a ValueError."""

    def parsed(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole(text, 0)


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def positive(text: str) -> float:
    """Parse a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value
