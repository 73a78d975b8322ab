"""Parse conversations in the format of LLaVA, ShareGPT or OpenAI into questions, answers and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medalign.data.samples.image_tags import TAG, check_count, strip_tags
from medalign.data.samples.sample import BadSample
from medalign.datasets.image_fields import named_images

_LISTS = ("conversations", "conversatons", "messages")  # the second is a typo in LLaVA-Med's alignment file
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm")


@dataclass(frozen=True)
class Turn:
    """A question and its answer. Values that are not text are rejected later, with the name of the field."""

    question: Any
    answer: Any
    images: int  # number of images of the entry shown up to this turn


def has_conversation(row: Any) -> bool:
    """Return whether a value is an entry with a conversation."""
    return isinstance(row, dict) and any(name in row for name in _LISTS)


def parse_entry(row: Mapping[str, Any]) -> tuple[list[Any], list[Turn]]:
    """Parse one entry.

    If the text contains image placeholders, there must be one per image, in the order of the image names, and an image
    is shown from the turn of its placeholder on. Otherwise all images come before the first question.

    Returns:
        The names of the images, and the turns.

    Raises:
        BadSample: the number of placeholders is wrong, or questions and answers do not alternate.
    """
    turns = [_text_and_tags(turn) for turn in _turns(row)]
    names = named_images(row)
    if not names:
        _check_no_other_name(row)
    tags = [count for _, count in turns]
    check_count(sum(tags), len(names))
    if any(tags[1::2]):
        raise BadSample(f"an answer contains {TAG}")
    shown = [sum(tags[: i + 1]) if any(tags) else len(names) for i in range(0, len(tags), 2)]
    texts = [text for text, _ in turns]
    return names, [Turn(*turn) for turn in zip(texts[::2], texts[1::2], shown, strict=True)]


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of user and model as in the entry, without system messages."""
    turns = next((row[name] for name in _LISTS if name in row), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("there is no list of conversations")
    turns = [turn for turn in turns if _speaker(turn) != "system"]
    sides = [_ASKS, _ANSWERS] * (len(turns) // 2)
    if not turns or len(sides) != len(turns) or not all(_speaker(t) in s for t, s in zip(turns, sides, strict=True)):
        raise BadSample("conversation does not alternate between human and gpt")
    return turns


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def _text_and_tags(turn: Mapping[str, Any]) -> tuple[Any, int]:
    """Text of a turn without placeholders, with line breaks, and the number of placeholders."""
    value = turn.get("value", turn.get("content"))
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        value = "\n".join(_part(part) for part in value)
    if not isinstance(value, str):
        return value, 0
    text, count = strip_tags(value)
    return text.strip(), count


def _part(part: Mapping[str, Any]) -> str:
    """Convert a part of typed content to text."""
    if part["type"] == "text" and isinstance(text := part.get("text"), str):
        return text
    if part["type"] == "image" and part.keys() == {"type"}:
        return TAG
    raise BadSample(f'content has a part of type {part["type"]!r}, which is not supported; name images in "image"')


def _check_no_other_name(row: Mapping[str, Any]) -> None:
    """Raise BadSample if an entry without an image names one in another field."""
    for key, value in row.items():
        names = value if isinstance(value, list) else [value]
        if key not in ("id", "image", "images") and any(_is_picture(name) for name in names):
            raise BadSample(f'{key!r} names an image; only "image" and "images" are read')


def _is_picture(name: Any) -> bool:
    return isinstance(name, str) and name.lower().endswith(_PICTURES)
