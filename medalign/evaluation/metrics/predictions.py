"""One answer beside its reference, as a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from medalign.errors import DataError

STOP, LENGTH = "stop", "length"  # why generation ended: an end token, or the limit of new tokens
ATTENTION_DIGITS = 4  # significant digits that the file keeps of an attention value


@dataclass
class Prediction:
    """What a run answered to one sample. The grounding fields are None where no box covers the image."""

    key: str
    task: str  # "vqa" or "report"
    question: str
    answer: str  # the reference
    answer_type: str  # "closed", "open", or "" where it is not known
    prediction: str
    finish_reason: str = ""  # STOP or LENGTH; "" where it is not known
    empty: bool = False  # the answer has no text
    attention_inside: float | None = None  # share of the question's attention inside the boxes
    box_area: float | None = None  # the boxes' share of the picture: what attention spread evenly gives
    pointing_hit: bool | None = None  # does the strongest patch point at a box
    pointing_chance: float | None = None  # share of the patches that would be hits
    attention: list[float] | None = None  # the question's map of the first image on the student's grid, row-major
    boxes: list[list[float]] = field(default_factory=list)  # x0, y0, x1, y1 in pixels of the first image
    image_size: tuple[int, int] | None = None  # width, height of the first image
    folder: int = 0  # position of its shard folder among those that were evaluated; a key is unique within one


def write_predictions(path: Path, rows: Iterable[Prediction]) -> None:
    """One JSON object a line, written as it comes; the file appears under its name once it is whole.

    Until then it is `unfinished(path)`, and where `rows` fails it stays there. Values that are not finite are a
    DataError.
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
    """Where the rows of `path` stand until it is whole."""
    return path.with_name(f".{path.name}.unfinished")


def _line(row: Prediction) -> str:
    values = asdict(row)
    if row.attention is not None:
        values["attention"] = [float(f"{value:.{ATTENTION_DIGITS}g}") for value in row.attention]
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"prediction {row.key!r} holds a value that is not finite: {error}") from error


def read_predictions(path: Path) -> list[Prediction]:
    """The rows of `write_predictions`. Raises DataError that names the file and the line."""
    names = {item.name for item in fields(Prediction)}
    rows = []
    # Not splitlines(): JSON leaves characters such as U+2028 inside a line.
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
