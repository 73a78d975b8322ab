"""Rows of parquet files in the form of the Hugging Face hub: listed without their images, read by row group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.datasets.texts import text
from medalign.errors import ConfigError, DataError

SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}  # in names of files -> of the shards


def split_files(*folders: Path) -> list[tuple[str, Path]]:
    """Return split and path of each file named SPLIT-*.parquet in these folders, in the order of the splits."""
    paths = sorted(path for folder in folders for path in folder.glob("*.parquet"))
    return [(split, path) for name, split in SPLITS.items() for path in paths if path.name.split("-")[0] == name]


def part_name(path: Path) -> str:
    """Return the number of a file in its name, as in train-00000-of-00007.parquet."""
    return path.stem.split("-")[1] if "-" in path.stem else "00000"


def list_rows(folder: Path, path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the place of each row, which `read_row` takes, without reading the rows.

    Args:
        folder: the folder of the data set.
        path: a file in it.
        columns: the columns that it must have.

    Raises:
        DataError: the file cannot be read, or lacks a column.
        ConfigError: pyarrow is not installed.
    """
    with _open(path) as file:
        absent = [name for name in columns if name not in file.schema_arrow.names]
        if absent:
            raise DataError(f"{path} has no column {absent[0]!r}; its columns are {file.schema_arrow.names}")
        for group in range(file.num_row_groups):
            for row in range(file.metadata.row_group(group).num_rows):
                yield {"file": str(path.relative_to(folder)), "group": group, "row": row}


def read_row(folder: Path, place: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """Read a row.

    Args:
        folder: the folder of the data set.
        place: as `list_rows` yields it; other entries are ignored.
        columns: the columns to read.

    Raises:
        BadSample: its text is not UTF-8.
        DataError: the file is damaged.
    """
    rows = _row_group(folder / place["file"], place["group"], tuple(columns))
    try:
        row: dict[str, Any] = rows.slice(place["row"], 1).to_pylist()[0]
    except ValueError as error:
        raise BadSample(f"row cannot be read ({error})") from error
    return row


def image_bytes(row: Mapping[str, Any], column: str = "image") -> bytes:
    """Return the bytes of an image of the hub, which is {bytes, path}. Raises BadSample if there are none."""
    value = row[column]
    found = value.get("bytes") if isinstance(value, dict) else None
    if not found:
        raise BadSample(f"row contains no {column}")
    return bytes(found)


@lru_cache(maxsize=2)
def _row_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    """Read a row group as a table. It is cached, because a part reads its rows one after another."""
    with _open(path) as file:
        try:
            return file.read_row_group(group, columns=list(columns))
        except (OSError, ValueError) as error:  # ValueError includes pyarrow.ArrowInvalid
            raise DataError(f"{path} is damaged ({text(str(error))}); download it again") from error


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path.name} is a parquet file; run pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read ({text(str(error))}); download it again") from error
