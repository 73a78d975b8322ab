"""S-Chain (Le-Duc et al. 2025): MR slices of brains with a chain of four questions, from parquet files in 16 languages.

Each row has an image of OASIS, and the answers to: where is the finding (A1, boxes), what is seen there (A2), how is it
rated (A3), and which grade of dementia follows (A4). The sample asks the last question. The steps before it are kept in
the metadata, and the boxes of the first one are the sample's ground truth for grounding.

The boxes are corners in shares of the image, as the authors' own scripts read A1. The column of boxes as (X, Y, W, H)
is kept as text.
"""

from __future__ import annotations

import ast
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.samples.decode import picture_header
from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import as_png_or_jpeg
from medalign.datasets.parquet import image_bytes, list_rows, part_name, read_row, split_files
from medalign.datasets.texts import as_text, field, text

LAYOUT = """\
English/train-00000-of-....parquet, ...         columns image ({bytes, path}), Q1 to Q4, A1 to A4, Patient ID, ...
English/test-00000-of-....parquet, ...
French/..., and so on                           one folder per language

The output is train/ and test/ of the published split, which is by patient. The sample's question is Q4, and its answer
A4. Q1 to Q3 with their answers are kept in the metadata as steps, and the boxes in A1 are the sample's boxes. The
copies of the images that show the boxes are not read. Requires pyarrow (pip install pyarrow)."""

_XYWH = "Bbox coordinates normalized (X, Y, W, H)"
_TEXTS = tuple(f"{kind}{number}" for number in range(1, 5) for kind in "QA")
_COLUMNS = ("image", "Patient ID", "Slide", "Notes", _XYWH, *_TEXTS)
_LONGEST = 10_000  # characters of A1; a row has a few boxes


def _folder(folder: Path, language: str) -> Path:
    """Return the folder of a language, whose name may be in small letters."""
    return next((folder / name for name in (language, language.lower()) if (folder / name).is_dir()), folder / language)


def _language(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_-]+", value):
        raise ValueError(f"{value!r} is not the name of a language's folder, such as English")
    return value


def _validate_layout(folder: Path, settings: Settings) -> list[str]:
    lines = []
    for language in settings["languages"]:
        found = {split for split, _ in split_files(_folder(folder, language))}
        lines += [
            f"{language}/{split}-*.parquet: the {split} split in {language}"
            for split in ("train", "test")
            if split not in found
        ]
    return lines


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    for language in settings["languages"]:
        for split, path in split_files(_folder(folder, language)):
            for number, place in enumerate(list_rows(folder, path, _COLUMNS)):
                key = f"s-chain-{language}-{split}-{part_name(path)}-{number:05d}"
                yield Item(split, key, place | {"language": language})


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = read_row(folder, item.data, _COLUMNS)
    picture = as_png_or_jpeg(image_bytes(row))
    width, height = picture_header(picture.data)[1:3]
    patient = field(row, "Patient ID")
    fields = {
        "id": item.key,
        "task": "vqa",
        "question": field(row, "Q4"),
        "answer": field(row, "A4"),
        "answer_type": "closed",
        "boxes": [_pixels(box, width, height) for box in _boxes(as_text(row["A1"], "A1"))],
        "steps": [{"question": field(row, f"Q{number}"), "answer": field(row, f"A{number}")} for number in (1, 2, 3)],
        "language": item.data["language"],
        "split": item.split,
        "patient": patient,
        "case": f"{patient}/{field(row, 'Slide')}",
        "notes": text(row["Notes"]),
        "boxes_xywh": text(row[_XYWH]),
    }
    return Record(item.key, (picture,), fields)


def _boxes(written: str) -> list[list[float]]:
    """Parse a list of boxes [x0, y0, x1, y1] in shares of the image. Raises BadSample if it is anything else."""
    if not written.strip():
        return []
    try:
        if len(written) > _LONGEST:
            raise ValueError(f"{len(written)} characters")
        found = ast.literal_eval(written.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadSample(f"A1 is {reprlib.repr(written)}, which is not a list of boxes") from error
    while isinstance(found, (list, tuple)) and len(found) == 1 and isinstance(found[0], (list, tuple)):
        inner = found[0]
        if not inner or not isinstance(inner[0], (list, tuple)):
            break
        found = inner  # some rows have one more pair of brackets
    if not isinstance(found, (list, tuple)):
        raise BadSample(f"A1 is {reprlib.repr(written)}, which is not a list of boxes")
    return [_corners(box) for box in found]


def _corners(box: Any) -> list[float]:
    numbers = isinstance(box, (list, tuple)) and len(box) == 4
    if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        raise BadSample(f"box {reprlib.repr(box)} in A1 is not four numbers [x0, y0, x1, y1]")
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise BadSample(f"box {reprlib.repr(box)} in A1 is not corners [x0, y0, x1, y1] in shares of the image")
    return list(map(float, box))


def _pixels(box: list[float], width: int, height: int) -> list[float]:
    return [box[0] * width, box[1] * height, box[2] * width, box[3] * height]


CONVERTER = DatasetConverter(
    "s-chain",
    "S-Chain: dementia in MR of the brain, with boxes and the steps to the answer",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (Setting("languages", "folders of the languages to convert", ["English"], several=True, parse=_language),),
    "S-Chain (leduckhai/S-Chain on Hugging Face)",
)
