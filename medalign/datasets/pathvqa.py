"""PathVQA (He et al. 2020): questions about pathology images, from parquet files with images and text.

The first release stores its questions in pickle files, which can run code when they are read; they are not supported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from medalign.data.shards.records import Record, Refused
from medalign.datasets.base import DatasetConverter, Item, Settings
from medalign.datasets.files import as_png_or_jpeg
from medalign.datasets.parquet import image_bytes, list_rows, part_name, read_row, split_files
from medalign.datasets.texts import field, yes_no_type

LAYOUT = """\
data/train-00000-of-00007.parquet, ...         columns image ({bytes, path}), question, answer
data/validation-00000-of-00003.parquet, ...
data/test-00000-of-00003.parquet, ...
(the files may also be in the folder itself)

The output is train/, val/ and test/. Questions answered by yes or no are closed, all others open. The pickle files of
the first release are not read, because pickle can run code. Requires pyarrow (pip install pyarrow)."""

_COLUMNS = ("image", "question", "answer")


def _files(folder: Path) -> list[tuple[str, Path]]:
    return split_files(folder, folder / "data")


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    found = {split for split, _ in _files(folder)}
    lines = [f"data/{split}-*.parquet: the {split} split" for split in ("train", "test") if split not in found]
    if lines and any(folder.glob("**/*.pkl")):
        lines.append("(its .pkl files are pickles, which are not read; download the parquet files)")
    return lines


def _iter_items(folder: Path, _settings: Settings) -> Iterator[Item | Refused]:
    for split, path in _files(folder):
        for number, place in enumerate(list_rows(folder, path, _COLUMNS)):
            yield Item(split, f"pathvqa-{split}-{part_name(path)}-{number:05d}", place)


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    row = read_row(folder, item.data, _COLUMNS)
    image = image_bytes(row)
    answer = field(row, "answer")
    fields = {
        "id": item.key,
        "task": "vqa",
        "question": field(row, "question"),
        "answer": answer,
        "answer_type": yes_no_type(answer),
        "split": item.split,
        "case": hashlib.sha256(image).hexdigest()[:16],  # the files contain no image names
    }
    return Record(item.key, (as_png_or_jpeg(image),), fields)


CONVERTER = DatasetConverter(
    "pathvqa",
    "PathVQA: questions on pathology, from parquet files",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    public_name="PathVQA (flaviagiammarino/path-vqa on Hugging Face)",
)
