"""What is no text and no number, wherever in an annotation it stands.

JSON has no NaN, but many tools write it; half a character is what cutting a text at a fixed length leaves of an emoji.
Both would pass until the tokenizer, or a sum over the metadata, stops the training.
"""

from __future__ import annotations

import re
import sys
from typing import Any

MOST_LEVELS = 64  # of lists and objects within each other

MARKS = ("\ufdd0", "\ufdd1")  # noncharacters, which `spelling` puts around a text's special tokens
_NO_TEXT = re.compile(f"[\0\ud800-\udfff{''.join(MARKS)}]")


def fault(value: Any, *, numbers: bool = True) -> str | None:
    """The first fault of a value or of what it holds, to be read after the value's name; None without one.

    Args:
        numbers: whether numbers are looked at.
    """
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        one, level = waiting.pop()
        if isinstance(one, str) and (found := _NO_TEXT.search(one)):
            return f"holds {_named(found[0])} (U+{ord(found[0]):04X})"
        if numbers and isinstance(one, int | float) and not abs(one) <= sys.float_info.max:
            return f"holds {_shown(one)}, which is not a number that can be used"
        if isinstance(one, dict | list | tuple):
            if level == MOST_LEVELS:
                return f"is nested deeper than {MOST_LEVELS} levels"
            inner = [*one.keys(), *one.values()] if isinstance(one, dict) else one
            waiting += [(item, level + 1) for item in reversed(inner)]
    return None


def _named(character: str) -> str:
    if character in MARKS:
        return "a noncharacter of Unicode"
    return "half a character" if ord(character) else "the character NUL"


def _shown(number: float) -> str:
    return str(number) if isinstance(number, float) else f"an integer of {number.bit_length()} bits"
