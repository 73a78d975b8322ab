"""Predictions with their references, stored as JSON lines.

The rows of other systems can be scored too: a line needs `key`, `task`, `question`, `answer` and `prediction`; every
other field of `Prediction` is optional. Fields that are not known are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from medalign.errors import DataError
from medalign.observability.files import write_text

STOP, LENGTH = "stop", "length"  # why generation ended: an end token, or the limit of new tokens
ATTENTION_DIGITS = 4  # significant digits of attention values in the file


@dataclass
class Prediction:
    """The answer of a run to one sample. The grounding fields are None if no box covers a part of the image."""

    key: str
    task: str  # "vqa" or "report"
    question: str
    answer: str  # the reference
    answer_type: str  # "closed", "open", or "" if unknown
    prediction: str
    finish_reason: str = ""  # STOP or LENGTH; "" if unknown
    empty: bool = False  # the answer has no text
    attention_inside: float | None = None  # fraction of the question's attention inside the boxes
    box_area: float | None = None  # fraction of the image that the boxes cover: the score of uniform attention
    pointing_hit: bool | None = None  # whether the patch with the largest attention is a hit
    pointing_chance: float | None = None  # fraction of the patches that are hits
    attention: list[float] | None = None  # the question's, to the first image, on the student's grid, row-major
    boxes: list[list[float]] = field(default_factory=list)  # x0, y0, x1, y1 in pixels of the first image
    image_size: tuple[int, int] | None = None  # width, height of the first image
    folder: int = 0  # index of its shard folder among the evaluated folders; a key is unique within a folder
    truncated: bool = False  # the question was truncated to the maximum length
    image: str = ""  # digest of the images' pixels: questions about the same images have the same one
    patient: str = ""  # as in the annotation; "" if it does not name one
    question_type: str = ""  # as in the annotation
    finding: str = ""  # as in the annotation
    modality: str = ""  # as in the annotation
    options: list[str] = field(default_factory=list)  # the choices of the question, in order; empty if it has none


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """Write one JSON object per line, to another name first, so that `path` is always whole.

    Raises:
        DataError: a value is not finite.
    """
    write_text(path, "".join(map(format_prediction, rows)))


def format_prediction(row: Prediction) -> str:
    """Return the line of a prediction. Raises DataError if a value is not finite."""
    values = asdict(row)
    if row.attention is not None:
        values["attention"] = rounded(row.attention)
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"prediction {row.key!r} contains a value that is not finite: {error}") from error


def rounded(attention: Sequence[float]) -> list[float]:
    """Return attention as it is stored. Scores use these values, so that they are the same from the file."""
    return [float(f"{value:.{ATTENTION_DIGITS}g}") for value in attention]


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions of `write_predictions` or of another system.

    Raises:
        DataError: the file is not text in UTF-8, or a line is not a prediction; the message names the file and the
            line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    # splitlines() would also split at characters such as U+2028, which JSON does not escape.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse(line: str, place: str) -> Prediction:
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not a prediction: {error}; remove the line or evaluate again") from error
    return prediction_of(values, place)


def prediction_of(values: Any, place: str) -> Prediction:
    """Return the prediction that a JSON value describes. Fields that are not known are ignored.

    Raises:
        DataError: it does not describe one; the message begins with `place`.
    """
    if not isinstance(values, dict):
        raise DataError(f"{place} is a JSON {type(values).__name__}, not an object; write one object per line")
    known = {name: values[name] for name in _TYPES if name in values}
    for name in _REQUIRED:
        if name not in known:
            raise DataError(f"{place} has no {name!r}; a prediction needs {', '.join(_REQUIRED)}")
    for name, value in known.items():
        if not _CHECKS[name](value):
            found = json.dumps(value) if value is None or _number(value) else f"a {type(value).__name__}"
            raise DataError(f"{place}: {name} is {found}; it must be {_TYPES[name]}")
    values = {"answer_type": "", "empty": not known["prediction"].strip()} | known
    row = Prediction(**values)
    if row.image_size is not None:
        row.image_size = (row.image_size[0], row.image_size[1])
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list_of(check: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def checked(value: Any) -> bool:
        return isinstance(value, list) and all(map(check, value)) and length in (None, len(value))

    return checked


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int and value >= 0,
    "float | None": _or_null(_number),
    "bool | None": _or_null(lambda value: isinstance(value, bool)),
    "list[float] | None": _or_null(_list_of(_number)),
    "list[list[float]]": _list_of(_list_of(_number, 4)),
    "list[str]": _list_of(lambda value: isinstance(value, str)),
    "tuple[int, int] | None": _or_null(_list_of(lambda value: type(value) is int and value > 0, 2)),
}
_TYPES = {item.name: str(item.type) for item in fields(Prediction)}  # the annotations, which are text in this module
_CHECKS = {name: _OF_TYPE[kind] for name, kind in _TYPES.items()}
_REQUIRED = ("key", "task", "question", "answer", "prediction")
