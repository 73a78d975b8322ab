"""One entry of conversations, in the keys of LLaVA, ShareGPT or OpenAI, as questions and answers with their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medalign.data.samples.image_tags import TAG, check_count, strip_tags
from medalign.data.samples.sample import BadSample
from medalign.datasets.image_fields import named_images

_LISTS = ("conversations", "conversatons", "messages")  # LLaVA-Med's alignment file spells the second
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm")


@dataclass(frozen=True)
class Turn:
    """A question with its answer: text, or what stands in its place and will be refused by name."""

    question: Any
    answer: Any
    images: int  # of the entry's images those that are shown up to here


def holds_conversation(row: Any) -> bool:
    return isinstance(row, dict) and any(name in row for name in _LISTS)


def parse_entry(row: Mapping[str, Any]) -> tuple[list[Any], list[Turn]]:
    """The names of an entry's images, and its turns.

    Where the text has tags, there is one per image in the order of their names, and an image is shown from the turn of
    its tag on; without tags all images come before the first question. Raises BadSample for other numbers of tags, and
    for what is not questions and answers in turn.
    """
    turns = [_text_and_tags(turn) for turn in _turns(row)]
    names = named_images(row)
    if not names:
        _check_no_other_name(row)
    tags = [count for _, count in turns]
    check_count(sum(tags), len(names))
    if any(tags[1::2]):
        raise BadSample(f"{TAG} stands in an answer")
    shown = [sum(tags[: i + 1]) if any(tags) else len(names) for i in range(0, len(tags), 2)]
    texts = [text for text, _ in turns]
    return names, [Turn(*turn) for turn in zip(texts[::2], texts[1::2], shown, strict=True)]


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of user and model, as they stand in the entry."""
    turns = next((row[name] for name in _LISTS if name in row), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("no list of conversations")
    turns = [turn for turn in turns if _speaker(turn) != "system"]
    sides = [_ASKS, _ANSWERS] * (len(turns) // 2)
    if not turns or len(sides) != len(turns) or not all(_speaker(t) in s for t, s in zip(turns, sides, strict=True)):
        raise BadSample("conversation is not human and gpt in turn")
    return turns


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))


def _text_and_tags(turn: Mapping[str, Any]) -> tuple[Any, int]:
    """What a turn says without tags, line breaks kept, and the number of its tags."""
    value = turn.get("value", turn.get("content"))
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        value = "\n".join(_part(part) for part in value)
    if not isinstance(value, str):
        return value, 0
    text, count = strip_tags(value)
    return text.strip(), count


def _part(part: Mapping[str, Any]) -> str:
    """A part of typed content as text."""
    if part["type"] == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if part["type"] == "image" and part.keys() == {"type"}:
        return TAG
    raise BadSample(f'content has a part of type {part["type"]!r} that is not read; name images under "image"')


def _check_no_other_name(row: Mapping[str, Any]) -> None:
    """Raises BadSample where an entry that seems to have no image names one under another key."""
    for key, value in row.items():
        names = value if isinstance(value, list) else [value]
        if key not in ("id", "image", "images") and any(_is_picture(name) for name in names):
            raise BadSample(f'{key!r} names a picture; only "image" and "images" are read')


def _is_picture(name: Any) -> bool:
    return isinstance(name, str) and name.lower().endswith(_PICTURES)
