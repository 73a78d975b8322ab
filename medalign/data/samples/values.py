"""Find invalid text and numbers anywhere in an annotation.

JSON has no NaN, but many tools write it. Half of a surrogate pair remains if a text is cut within an emoji. Both would
go unnoticed until they stop the training, in the tokenizer or in a sum over the metadata.
"""

from __future__ import annotations

import re
import sys
from typing import Any

MAX_NESTING = 64  # levels of lists and objects

MARKS = ("\ufdd0", "\ufdd1")  # noncharacters, which `spelling` places around the special tokens of a text
_INVALID = re.compile(f"[\0\ud800-\udfff{''.join(MARKS)}]")


def fault(value: Any, *, numbers: bool = True) -> str | None:
    """Find the first fault of a value or of its content.

    Args:
        value: any JSON value.
        numbers: whether numbers are checked.

    Returns:
        A phrase to follow the name of the value, or None if the value is valid.
    """
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        current, level = stack.pop()
        if isinstance(current, str) and (found := _INVALID.search(current)):
            return f"contains {_describe_character(found[0])} (U+{ord(found[0]):04X})"
        if numbers and isinstance(current, int | float) and not abs(current) <= sys.float_info.max:
            return f"contains {_describe(current)}, which is not a usable number"
        if isinstance(current, dict | list | tuple):
            if level == MAX_NESTING:
                return f"is nested deeper than {MAX_NESTING} levels"
            inner = [*current.keys(), *current.values()] if isinstance(current, dict) else current
            stack += [(item, level + 1) for item in reversed(inner)]
    return None


def _describe_character(character: str) -> str:
    if character in MARKS:
        return "a noncharacter of Unicode"
    return "half a character" if ord(character) else "the character NUL"


def _describe(number: float) -> str:
    return str(number) if isinstance(number, float) else f"an integer of {number.bit_length()} bits"
