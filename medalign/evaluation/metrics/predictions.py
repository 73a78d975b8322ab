"""Predictions with their references, stored as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from medalign.errors import DataError

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


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """Write one JSON object per line as soon as `rows` yields it, to `unfinished(path)`, and rename that to `path`.

    If `rows` fails, the rows so far remain in `unfinished(path)`.

    Raises:
        DataError: a value is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(_line(row))
                file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        if part.is_file() and not part.stat().st_size:
            part.unlink()


def unfinished(path: Path) -> Path:
    """Return the path of the rows until all of them are written."""
    return path.with_name(f".{path.name}.unfinished")


def _line(row: Prediction) -> str:
    values = asdict(row)
    if row.attention is not None:
        values["attention"] = [float(f"{value:.{ATTENTION_DIGITS}g}") for value in row.attention]
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"prediction {row.key!r} contains a value that is not finite: {error}") from error


def read_predictions(path: Path) -> list[Prediction]:
    """Read the rows that `write_predictions` wrote.

    Raises:
        DataError: a line is not a prediction; the message names the file and the line.
    """
    names = {item.name for item in fields(Prediction)}
    rows = []
    # splitlines() would also split at characters such as U+2028, which JSON does not escape.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            row = Prediction(**{name: value for name, value in values.items() if name in names})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number} is not a prediction: {error}; evaluate the run again") from error
        if row.image_size is not None:
            row.image_size = (row.image_size[0], row.image_size[1])
        rows.append(row)
    return rows
