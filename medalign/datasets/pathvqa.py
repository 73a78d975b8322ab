"""PathVQA (He et al. 2020): questions about pathology images, from parquet files with images and text.

The first release stores its questions in pickle files, which can run code when they are read; they are not supported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.base import DatasetConverter, Item, Settings
from medalign.datasets.files import as_png_or_jpeg
from medalign.datasets.texts import field, text, yes_no_type
from medalign.errors import ConfigError, DataError

LAYOUT = """\
data/train-00000-of-00007.parquet, ...         columns image ({bytes, path}), question, answer
data/validation-00000-of-00003.parquet, ...
data/test-00000-of-00003.parquet, ...
(the files may also be in the folder itself)

The output is train/, val/ and test/. Questions answered by yes or no are closed, all others open. The pickle files of
the first release are not read, because pickle can run code. Requires pyarrow (pip install pyarrow)."""

_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}
_COLUMNS = ("image", "question", "answer")


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Split and path of each parquet file, in the order of the splits."""
    paths = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    return [(split, path) for name, split in _SPLITS.items() for path in paths if path.name.split("-")[0] == name]


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    found = {split for split, _ in _files(folder)}
    lines = [f"data/{split}-*.parquet: the {split} split" for split in ("train", "test") if split not in found]
    if lines and any(folder.glob("**/*.pkl")):
        lines.append("(its .pkl files are pickles, which are not read; download the parquet files)")
    return lines


def _iter_items(folder: Path, _settings: Settings) -> Iterator[Item | Refused]:
    for split, path in _files(folder):
        number = 0
        with _open(path) as file:
            absent = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if absent:
                raise DataError(f"{path} has no column {absent[0]!r}; its columns are {file.schema_arrow.names}")
            for group in range(file.num_row_groups):
                for row in range(file.metadata.row_group(group).num_rows):
                    place = {"file": str(path.relative_to(folder)), "group": group, "row": row}
                    part = path.stem.split("-")[1] if "-" in path.stem else "00000"
                    yield Item(split, f"pathvqa-{split}-{part}-{number:05d}", place)
                    number += 1


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    place = item.data
    rows = _rows(folder / place["file"], place["group"])
    try:
        row = rows.slice(place["row"], 1).to_pylist()[0]
    except ValueError as error:  # text that is not UTF-8
        raise BadSample(f"row cannot be read ({error})") from error
    image = row["image"].get("bytes") if isinstance(row["image"], dict) else None
    if not image:
        raise BadSample("row contains no image")
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


@lru_cache(maxsize=2)
def _rows(path: Path, group: int) -> Any:
    """Read a row group as a table. It is cached, because a part reads its rows one after another."""
    with _open(path) as file:
        try:
            return file.read_row_group(group, columns=list(_COLUMNS))
        except (OSError, ValueError) as error:  # ValueError includes pyarrow.ArrowInvalid
            raise DataError(f"{path} is damaged ({text(str(error))}); download it again") from error


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("PathVQA is stored in parquet files; run pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read ({text(str(error))}); download it again") from error


CONVERTER = DatasetConverter(
    "pathvqa",
    "PathVQA: questions on pathology, from parquet files",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    public_name="PathVQA (flaviagiammarino/path-vqa on Hugging Face)",
)
